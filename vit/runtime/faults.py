"""What the machine can do to a run: a full disk, too little memory, a lost process, told in one
line.
"""

import contextlib
import errno
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from vit.errors import TrainingFailed
from vit.text import first_line

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def faults_end_training(images_at_once: int, kept: Callable[[], str]) -> Iterator[None]:
    """Inside: what the machine does to a run becomes a TrainingFailed, and everything else stays
    what it is.

    images_at_once: of the forward pass, for the advice where memory runs out; kept: what to add to
    the message, such as how to resume.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        message = describe_fault(error, images_at_once)
        if message is None:  # a bug
            raise
        raise TrainingFailed(message + kept()) from None


def describe_fault(error: OSError | RuntimeError, images_at_once: int) -> str | None:
    """A message for a full disk, too little memory or a lost process; None for anything else, which
    is a bug.
    """
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"the disk takes no more ({error.strerror or error}); make room"
    if isinstance(error, torch.OutOfMemoryError):
        smaller = max(1, images_at_once // 2)
        return (
            f"out of memory: try train.micro_batch_size={smaller}, "
            f"which leaves the result as it is ({first_line(error)})"
        )
    # gloo raises a plain RuntimeError that only its text tells apart; so does the loader
    if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
        return f"another process of this run has ended ({first_line(error)})"
    if str(error).startswith("DataLoader worker"):
        return (
            f"a process that decodes image files died ({first_line(error)}); "
            "if memory is short, lower runtime.workers"
        )
    return None
