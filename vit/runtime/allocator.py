"""The C library's memory, set for training on a CPU: kept when it is freed, and in large pages.

Every step frees the tensors that the next one needs again. By default glibc gives large ones back
to the kernel at once, which has to clear them page by page when they are asked for anew. Costs and
gains: benchmarks/README.md, "Memory that is kept".
"""

import ctypes
import functools
import mmap
import os
import resource
from pathlib import Path

# The parameters of mallopt, from glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4
DEFAULT_MMAP_MAX = 65536

# Single tensors above it still go back to the kernel at once
LARGEST_KEPT = 256 << 20
# How much of the machine's memory may lie in large pages, as a divisor
SHARE_OF_MEMORY = 2
# With any of these the user has chosen an allocator, or set glibc's
CHOICES = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


@functools.cache
def keep_freed_memory(device_type: str) -> bool:
    """Keep freed memory for later tensors, in large pages where Linux has them; whether it is done.

    Changes no result. Does nothing for a GPU, whose memory torch keeps by itself, without glibc, or
    where the user has chosen an allocator. Once is enough for a process.
    """
    if device_type != "cpu" or any(os.environ.get(name) for name in CHOICES):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  the other C libraries do not have it
    except (OSError, AttributeError, TypeError):
        return False

    # -1: the end of the heap is never given back
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    if may_reserve():
        reserve_large_pages(libc, os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // SHARE_OF_MEMORY)
    return True


def may_reserve() -> bool:
    """Whether addresses that are not used cost nothing: without limits on them."""
    limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    if any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits):
        return False
    # 2: the kernel counts what is reserved as if it were used
    return OVERCOMMIT.is_file() and OVERCOMMIT.read_text().strip() != "2"


def reserve_large_pages(libc: ctypes.CDLL, size: int) -> None:
    """Let the heap grow by `size` bytes of addresses, to be filled with large pages when used.

    The kernel is asked for large pages by address, so the heap has to have its addresses before.
    """
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    # From the heap, which alone stays when it is freed
    libc.mallopt(M_MMAP_MAX, 0)
    start = libc.malloc(size)
    libc.mallopt(M_MMAP_MAX, DEFAULT_MMAP_MAX)
    if not start:
        return

    # From the first whole page on. It fails where the kernel has no large pages; nothing is lost
    aligned = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = (start + size - aligned) // mmap.PAGESIZE * mmap.PAGESIZE
    libc.madvise(aligned, whole, mmap.MADV_HUGEPAGE)
    libc.free(start)
