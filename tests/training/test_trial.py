"""The look before the flight, where a person does not wait for its end."""

import signal

import pytest
from composing import configured
from small_training import MadeUpBatches, make_plan, make_state, make_step

from vit.errors import ConfigError, Stopped
from vit.runs.folder import RunFolder
from vit.runs.screen import Screen
from vit.runtime.signals import StopSignal
from vit.training import explanation
from vit.training.trial import Trial, try_steps

SMALL = [
    "experiment=digits",
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_heads=2",
    "train.batch_size=18",
    "runtime.device=cpu",
]


def test_a_signal_ends_the_measured_steps():
    stop = StopSignal()
    batches = MadeUpBatches()
    state = make_state()
    stop.receive(signal.SIGINT, None)
    with pytest.raises(Stopped, match="SIGINT"):
        try_steps(state, make_step(state, stop=stop), batches, total=4)
    assert batches.closed
    assert state.progress.step == 0


@pytest.mark.parametrize("part", ["load_dataset", "make_batches"])
def test_a_signal_leaves_neither_page_nor_folder(tmp_path, monkeypatch, part):
    """While the data is read, or between that and the first step."""
    stop = StopSignal()
    real = getattr(explanation.prepare, part)

    def interrupted(*arguments):
        stop.receive(signal.SIGINT, None)
        return real(*arguments)

    monkeypatch.setattr(explanation.prepare, part, interrupted)
    folder = tmp_path / "run"
    screen = Screen(speaks=False)
    with pytest.raises(Stopped, match="SIGINT"), RunFolder(folder).outcome() as run:
        explanation.explanation(configured(*SMALL), run, stop, screen)
    assert not folder.exists()


def test_passes_that_processes_would_not_share_are_refused(tmp_path):
    config = configured(
        *SMALL, "runtime.processes=2", "runtime.sharding=fsdp", "train.micro_batch_size=8"
    )
    run = RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^train\.micro_batch_size=8: .* passes"):
        explanation.explanation(config, run, StopSignal(), Screen(speaks=False))


def test_a_warmup_in_epochs_is_that_of_the_whole_batch(tmp_path):
    """The part of it that is measured would need three times as many steps for it."""
    steps, warmup = "train.steps=10", "schedule.warmup=0.1ep"
    config = configured(*SMALL, "runtime.processes=3", steps, warmup)
    run = RunFolder(tmp_path / "run")
    page = explanation.explanation(config, run, StopSignal(), Screen(speaks=False))
    assert "a step of each of 3 processes" in page


def test_processes_share_evaluations_too():
    """The steps of eight processes are measured on a part of the batch, evaluations on all."""
    trial = Trial(6, step_seconds=1.0, data_seconds=0.0, evaluation_seconds=80.0, memory={}, peak=0)
    share = explanation.Share(processes=8, batch_size=2, shards=1)
    lines = explanation.time_section(make_plan(10), trial, 1e9, share, 1e12, None)
    assert "about 0:30, of which 0:20 evaluating" in lines[1]
