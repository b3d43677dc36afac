"""Where the time of a run goes on a device that works while the host does something else."""

from types import SimpleNamespace

import pytest
import torch
from composing import configured
from helpers import rows
from small_training import MadeUpBatches, make_observer, make_plan, make_state

from benchmarks.emulated_device import emulated_device
from train import train
from vit.runs.folder import RunFolder
from vit.runs.screen import Screen
from vit.runtime.precision import Precision
from vit.runtime.processes import Processes
from vit.runtime.signals import StopSignal
from vit.training.batches import Batches
from vit.training.reporting import speed_of_steps

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RUN = (
    "model=vit_ti4",
    "model.hidden_size=16",
    "model.num_heads=2",
    "model.num_layers=1",
    "model.image_size=8",
    "data=synthetic",
    "data.num_classes=4",
    "data.num_images=200",
    "augment=light",
    "train.batch_size=16",
    "train.steps=6",
    "train.log_every=2",
    "runtime.compile=false",
    "runtime.workers=0",
)


class BatchesOn(MadeUpBatches):
    """Made-up batches for a device of this kind."""

    waited = Batches.waited
    timed = Batches.timed

    def __init__(self, device):
        super().__init__()
        self.machine = SimpleNamespace(device=device, processes=Processes())


@pytest.fixture
def now(monkeypatch):
    """The time in seconds, to be set."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def spend_a_step(observer, now, queued):
    """Take a batch in 5 s, 1 of them at the loader, queue a step in 2 s, and save in 3 s.

    queued: seconds until the device has done all that was queued.
    """
    with observer.waiting_for_data():
        observer.batches.loader_seconds += 1
        now[0] += 5
    with observer.stepping():
        now[0] += 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.synchronize", lambda device: now.append(now.pop() + queued))
        with observer.during("saving", "saving"):
            now[0] += 3


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        # On a CPU a batch is made while the host waits, and nothing is queued
        (CPU, {"data": 5, "steps": 2, "saving": 3}),
        (CUDA, {"data": 1, "steps": 4 + 2 + 7, "saving": 3}),
    ],
    ids=["cpu", "cuda"],
)
def test_waiting_for_the_device_is_no_waiting_for_data(tmp_path, now, device, expected):
    state = make_state(precision=Precision("fp32", device))
    observer = make_observer(tmp_path, state, make_plan(6), BatchesOn(device))
    state.progress.step = 1
    start = now[0]
    spend_a_step(observer, now, queued=7)
    spent = observer.clock.spent
    assert {purpose: getattr(spent, purpose) for purpose in expected} == expected
    assert spent.total() == now[0] - start
    assert observer.window.data_seconds == expected["data"]


def test_the_loaders_seconds_are_those_of_its_batches(now):
    batches = BatchesOn(CUDA)

    def loader():
        for seconds in (2, 3):
            now[0] += seconds
            yield torch.zeros(1), torch.zeros(1)

    for count, _ in enumerate(batches.timed(loader()), start=1):
        assert batches.loader_seconds == (2 if count == 1 else 5)
        # The step
        now[0] += 50
    assert count == 2


def test_speed_is_that_of_the_wall_clock(tmp_path):
    """The device computes while the host waits for data, so that wait belongs to the steps."""
    observer = make_observer(tmp_path, make_state(), make_plan(11), MadeUpBatches())
    observer.state.progress.step = 11
    observer.clock.count("steps", 8.0)
    observer.clock.count("data", 2.0)
    assert speed_of_steps(observer, CUDA) == 16 * 10 / 10
    assert speed_of_steps(observer, CPU) == 16 * 10 / 8


def train_on(device, folder):
    config = configured(*RUN, f"runtime.device={device}")
    with RunFolder(folder).outcome() as run:
        train(config, run, StopSignal(), [], Screen(speaks=False))
    return rows(folder / "timing.jsonl")


def test_peak_memory_and_the_wait_for_data_are_those_of_training(tmp_path, monkeypatch):
    events = []

    def noted(name, function):
        return lambda *arguments: events.append(name) or function(*arguments)

    find = "vit.training.start.agree_on_micro_batch_size"
    monkeypatch.setattr(find, noted("probe", lambda *arguments: 16))
    monkeypatch.setattr("vit.training.start.product_rate", noted("rate", lambda *_: 1e12))
    with emulated_device("cuda"):
        reset = "torch.cuda.reset_peak_memory_stats"
        monkeypatch.setattr(reset, noted("reset", lambda device: None))
        timing = train_on("cuda", tmp_path / "cuda")
    assert events == ["probe", "rate", "reset"]
    # Images in memory are waited for by nobody
    assert [row["data_wait"] for row in timing] == [0, 0, 0]
    assert all(row["data_wait"] > 0 for row in train_on("cpu", tmp_path / "cpu"))
