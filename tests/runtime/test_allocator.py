"""Memory that is kept: in a process of its own, whose page faults the kernel counts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vit.runtime.allocator import CHOICES

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings, Linux's pages")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Twenty tensors of 40 MB, one after another: above 32 MB glibc gives back every one
SCRIPT = """
import resource
import torch
from vit.runtime.allocator import keep_freed_memory
from vit.runtime.device import use_threads

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

{before}
done = keep_freed_memory("cpu")
use_threads(1)
# The heap grows for some of the first
for _ in range(10):
    torch.ones(10_000_000)
start = faults()
for _ in range(20):
    torch.ones(10_000_000)
print(done, faults() - start)
{after}
"""
PAGES_OF_ONE = 40_000_000 // 4096


def run(before="", after="", **environment):
    """Returns what keep_freed_memory() said, the faults of twenty tensors, and other output."""
    clean = {name: value for name, value in os.environ.items() if name not in CHOICES}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(before=before, after=after)],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    said, count, *rest = done.stdout.split()
    return said == "True", int(count), rest


@LINUX
def test_freed_memory_is_used_again():
    done, faults, _ = run()
    assert done
    # Not even the pages of one tensor, which was freed twenty times
    assert faults < PAGES_OF_ONE


@LINUX
def test_a_setting_of_the_user_is_kept():
    done, faults, _ = run(GLIBC_TUNABLES="glibc.malloc.mmap_threshold=1000000")
    assert not done
    assert faults > 20 * PAGES_OF_ONE * 0.9


@LINUX
def test_a_limit_of_addresses_is_not_used_up():
    limit = "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, resource.RLIM_INFINITY))"
    sizes = "print(open('/proc/self/statm').read().split()[0])"
    (_, faults, [limited]), (_, _, [free]) = run(limit, sizes), run(after=sizes)
    assert faults < PAGES_OF_ONE
    memory = os.sysconf("SC_PHYS_PAGES")
    assert int(free) - int(limited) > memory / 4


@LINUX
@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="this kernel has no large pages")
def test_the_heap_may_have_large_pages():
    # The kernel's mark for memory that asked for them
    marks = "print(any('hg' in line.split() for line in open('/proc/self/smaps')))"
    assert run(after=marks)[2] == ["True"]


def test_without_glibc_nothing_is_done(monkeypatch):
    from vit.runtime import allocator

    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory.__wrapped__("cpu")
