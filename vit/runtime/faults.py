"""Faults of the machine as one-line errors: a full disk, too little memory, a lost process.

Where nothing is trained, they end a command as a mistake of the user does.

They are no bugs, so a traceback would only hide what to do about them. Everything else keeps its
traceback, which is why faults are recognized one by one and never by a broad `except`.
"""

import contextlib
import errno
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch.distributed as dist

from vit.errors import ConfigError, Stopped, TrainingFailed
from vit.runtime.memory import is_out_of_memory, memory_errors
from vit.runtime.signals import StopSignal
from vit.text import first_line

Batch = TypeVar("Batch")

# No space, no quota, file too large, read-only file system
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# A container has 64 MB of it unless it is told otherwise, less than two batches of 256 at 224 px
OUT_OF_SHARED_MEMORY = (
    "too little shared memory (/dev/shm) for the batches of the processes that decode images; "
    "give a container more (docker run --shm-size=8g)"
)


@contextlib.contextmanager
def faults_end_training(
    images_at_once: int | None, kept: Callable[[], str], stop: StopSignal | None = None
) -> Iterator[None]:
    """Turn a fault of the machine in the block into TrainingFailed; other errors pass through.

    images_at_once: of a forward pass, for the advice where memory runs out; None where it is not
    known yet. kept: returns what to add to the message, such as how to resume. stop: of the run;
    where its limit of time is reached, the loss of another process is the end of that one, and
    Stopped is raised.
    """
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:
        message = describe_fault(error, images_at_once)
        # A bug, which keeps its traceback
        if message is None:
            raise
        if is_lost_worker(error):
            stop_watching_workers()
        if is_lost_process(error) and stop is not None and stop.is_at_limit():
            raise Stopped(f"stopped by {stop.describe()}") from None
        raise TrainingFailed(message + kept()) from None


def describe_fault(
    error: OSError | RuntimeError | MemoryError, images_at_once: int | None
) -> str | None:
    """Describe a full disk, too little memory or a lost process; None for anything else."""
    if is_out_of_shared_memory(error):
        return f"{OUT_OF_SHARED_MEMORY}, or lower runtime.workers"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"the disk can't be written to ({error.strerror or error}); make room"
    if is_out_of_memory(error):
        return f"out of memory: {memory_advice(images_at_once)} ({first_line(error)})"
    if is_lost_process(error):
        return f"another process of this run has ended ({first_line(error)})"
    if is_lost_worker(error):
        return (
            f"a process that decodes image files died ({first_line(error)}); "
            "if memory is short, lower runtime.workers"
        )
    return None


def memory_advice(images_at_once: int | None) -> str:
    """Return the setting to try where memory runs out with so many images at once."""
    if images_at_once == 1:
        return "try runtime.activation_checkpointing=true, or a smaller model"
    smaller = "a smaller train.micro_batch_size"
    if images_at_once is not None:
        smaller = f"train.micro_batch_size={images_at_once // 2}"
    return f"try {smaller}, which leaves the result as it is, dropout apart"


def is_lost_process(error: Exception) -> bool:
    """Whether it is the error of a collective that another process of the run has left."""
    # gloo, as the loader below, raises plain RuntimeErrors that only their text tells apart
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def is_out_of_shared_memory(error: Exception) -> bool:
    """Whether there is too little of it for a batch of the loader's processes."""
    texts = ("unable to allocate shared memory", "unable to resize file </torch")
    return any(text in str(error) for text in texts)


def is_lost_worker(error: Exception) -> bool:
    """Whether it is the loader's error for a worker process that has died."""
    return str(error).startswith("DataLoader worker")


def from_workers(batches: Iterable[Batch]) -> Iterator[Batch]:
    """What a DataLoader yields; raises its own error for a worker that is just dying as well.

    The system closes the connections of a killed process a moment before it says that it is dead.
    Until then the loader raises ConnectionResetError or EOFError, which say nothing to a user.
    """
    try:
        yield from batches
    except (ConnectionError, EOFError) as error:
        # It says so a moment later, in the middle of the report on this
        stop_watching_workers()
        raise RuntimeError(
            f"DataLoader worker has closed its connection ({type(error).__name__})"
        ) from error


@contextlib.contextmanager
def failures_explained(memory_advice: str, workers: str = "--workers") -> Iterator[None]:
    """Turn running out of memory, and what ends a loader's process, into a ConfigError with advice.

    memory_advice: how the message ends where memory runs out. workers: the option, or the key, that
    says how many processes decode images.
    """
    try:
        with memory_errors(memory_advice):
            yield
    except RuntimeError as error:
        if is_out_of_shared_memory(error):
            raise ConfigError(f"{workers}: {OUT_OF_SHARED_MEMORY}, or lower it") from None
        if not is_lost_worker(error):
            raise
        stop_watching_workers()
        raise ConfigError(
            f"{workers}: a process that decodes images died ({first_line(error)}); if memory, or "
            "the shared memory of a container (docker run --shm-size=…), is short, lower it"
        ) from None


def stop_watching_workers() -> None:
    """Take torch's handler of ended children away.

    It would raise the same error once more for every other child that ends, at whatever line the
    program is then: while it reports the first.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
