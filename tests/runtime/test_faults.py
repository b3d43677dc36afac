"""What the machine does to a run ends it in one line; everything else is a bug."""

import errno
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from composing import configured

from train import guarded_train
from vit.errors import ConfigError, Stopped, TrainingFailed
from vit.runs.folder import RunFolder
from vit.runtime.faults import (
    describe_fault,
    failures_explained,
    faults_end_training,
    from_workers,
)
from vit.runtime.signals import StopSignal
from vit.runtime.time_limit import TimeLimit
from vit.training import loop, start

SMALL = ["experiment=digits", "model.num_layers=1", "model.hidden_size=16", "model.num_heads=2"]

NO_SHARED_MEMORY = "RuntimeError: unable to allocate shared memory(shm) for file </torch_1>"
FAULTS = [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
    (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "train.micro_batch_size=8"),
    (RuntimeError("MPS backend out of memory (MPS allocated"), "train.micro_batch_size=8"),
    (MemoryError("Unable to allocate 1 TiB"), "train.micro_batch_size=8"),
    (dist.DistBackendError("NCCL error\nsecond line"), "another process"),
    (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed"), "another process"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal"), "runtime.workers"),
    (RuntimeError(f"Caught RuntimeError in …\n{NO_SHARED_MEMORY}"), "--shm-size=8g), or lower ru"),
]
BUGS = [
    OSError(errno.ENOENT, "No such file"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    KeyError("planted"),
]


@pytest.mark.parametrize(("error", "part"), FAULTS, ids=lambda value: type(value).__name__)
def test_faults_are_described_in_one_line(error, part):
    message = describe_fault(error, images_at_once=16)
    assert part in message
    assert "\n" not in message
    with pytest.raises(TrainingFailed) as failed, faults_end_training(16, lambda: "; kept"):
        raise error
    assert str(failed.value) == f"{message}; kept"
    assert failed.value.exit_code == 3
    assert failed.value.__suppress_context__


LOST = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed")


def stop_with_seconds_left(seconds):
    stop = StopSignal()
    stop.time_limit = TimeLimit(60, time.monotonic())
    stop.time_limit.ends = time.monotonic() + seconds
    return stop


def test_at_the_limit_of_time_a_lost_process_has_stopped_first():
    stop = stop_with_seconds_left(1)
    at_limit = pytest.raises(Stopped, match=r"runtime\.max_minutes=60")
    with at_limit, faults_end_training(16, lambda: "", stop):
        raise LOST
    with (
        pytest.raises(TrainingFailed, match="disk"),
        faults_end_training(16, lambda: "", stop),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stop", [StopSignal(), stop_with_seconds_left(10**5)])
def test_before_the_limit_a_lost_process_is_a_fault(stop):
    # Its launcher sends SIGTERM to the others
    stop.name = "SIGTERM"
    failed = pytest.raises(TrainingFailed, match="another process")
    with failed, faults_end_training(16, lambda: "", stop):
        raise LOST


def test_the_advice_never_falls_below_one_image():
    message = describe_fault(torch.OutOfMemoryError("out of memory"), images_at_once=1)
    assert "runtime.activation_checkpointing" in message
    assert "micro_batch_size" not in message


def test_before_the_first_step_the_advice_has_no_number():
    message = describe_fault(torch.OutOfMemoryError("out of memory"), images_at_once=None)
    assert "try a smaller train.micro_batch_size, " in message


def test_the_advice_halves_what_was_computed_at_once(tmp_path, monkeypatch):
    """A run whose micro-batch was found by itself, as on a GPU."""

    def no_memory(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(start, "choose_micro_batch_size", lambda *arguments: 6)
    monkeypatch.setattr(loop.Trainer, "fit", no_memory)
    config = configured(*SMALL, "train.batch_size=16", "runtime.device=cpu")
    failed = pytest.raises(TrainingFailed, match=r"train\.micro_batch_size=3,")
    with failed, RunFolder(tmp_path / "run").outcome() as run:
        guarded_train(config, run, StopSignal(), [])


@pytest.mark.parametrize("error", BUGS, ids=lambda value: type(value).__name__)
def test_a_bug_stays_what_it_is(error):
    with pytest.raises(type(error)) as raised, faults_end_training(16, lambda: "; kept"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("no room"), "out of memory (no room); buy more"),
        (RuntimeError(NO_SHARED_MEMORY), "--workers: too little shared memory (/dev/shm) for the"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.\nMore"),
            "--workers: a process that decodes images died (DataLoader worker (pid 7) is killed by",
        ),
    ],
)
def test_without_training_a_fault_ends_as_a_mistake_does(error, message):
    with pytest.raises(ConfigError) as raised, failures_explained("buy more"):
        raise error
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", BUGS, ids=lambda value: type(value).__name__)
def test_without_training_too_a_bug_stays_what_it_is(error):
    with pytest.raises(type(error)) as raised, failures_explained("buy more"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()]
)
def test_so_is_a_worker_whose_connection_is_closed_before_its_death_is_known(error):
    def dying():
        yield 1
        raise error

    before = signal.getsignal(signal.SIGCHLD)
    batches = from_workers(dying())
    assert next(batches) == 1
    try:
        with (
            pytest.raises(TrainingFailed, match=r"decodes image files died .*runtime\.workers"),
            faults_end_training(None, lambda: ""),
        ):
            next(batches)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_lost_worker_is_reported_once():
    """torch's handler raises its error again for every child that ends, so also meanwhile."""
    message = "DataLoader worker (pid 7) is killed by signal"

    def raise_again(number, frame):
        raise RuntimeError(message)

    before = signal.signal(signal.SIGCHLD, raise_again)
    try:
        with pytest.raises(TrainingFailed), faults_end_training(16, lambda: ""):
            os.kill(os.getpid(), signal.SIGCHLD)
        os.kill(os.getpid(), signal.SIGCHLD)
        # As in a run where nothing was lost
        signal.signal(signal.SIGCHLD, raise_again)
        with pytest.raises(KeyError), faults_end_training(16, lambda: ""):
            raise KeyError("planted")
        assert signal.getsignal(signal.SIGCHLD) is raise_again
    finally:
        signal.signal(signal.SIGCHLD, before)
