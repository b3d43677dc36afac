"""The checkpoints of one run: last, previous, best, and what resuming from them refuses."""

import dataclasses
import os

import pytest
import torch
from small_training import batch, make_model, make_state, make_step, same_bits

from vit.checkpoints.file import read_checkpoint, write_checkpoint
from vit.checkpoints.run import (
    BEST,
    LAST,
    PREVIOUS,
    RunCheckpoints,
    check_classes,
    read_last,
)
from vit.errors import CheckpointError

HEADER = {
    "config": {"seed": 1},
    "classes": ["cat", "dog", "fox"],
    "preprocessing": {"mean": [0.5]},
    "data": 1234,
}
ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05}


@pytest.fixture
def checkpoints(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return RunCheckpoints(tmp_path / "run" / "checkpoints", HEADER, writes=True)


def trained_state(steps=2):
    state = make_state(optimizer=ADAMW, ema_decay=0.9)
    step = make_step(state)
    for number in range(steps):
        step(*batch(number))
        state.ema.update(state.model, number)
        state.progress.step += 1
    return state


def test_the_last_checkpoint_brings_a_state_back(checkpoints):
    state = trained_state()
    state.progress.best_top1 = 0.25
    checkpoints.save_last(state)
    header = read_checkpoint(checkpoints.folder / LAST)[1]
    assert header["kind"] == "last"
    assert {key: header[key] for key in HEADER} == HEADER
    assert header["precision"] == "fp32"
    assert header["progress"]["step"] == 2
    assert header["versions"] == {"torch": torch.__version__}

    fresh = make_state(optimizer=ADAMW, ema_decay=0.9)
    assert checkpoints.resume(fresh, may_differ=False) == []
    assert fresh.progress == state.progress
    assert same_bits(fresh.model, state.model)
    assert same_bits(fresh.ema.model, state.ema.model)


def test_the_best_holds_the_selected_weights_under_their_plain_names(checkpoints):
    state = trained_state()
    checkpoints.save_best(state)
    tensors, header = read_checkpoint(checkpoints.folder / BEST)
    assert header["kind"] == "best"
    weights = state.ema.model.state_dict()
    assert tensors.keys() == weights.keys()
    assert all(torch.equal(tensors[name], weights[name]) for name in weights)

    best = [parameter.clone() for parameter in state.ema.model.parameters()]
    state.ema.update(make_model(init="xavier"), 5)
    loaded = checkpoints.load_best(state)
    assert loaded is state.ema.model
    assert all(map(torch.equal, loaded.parameters(), best))


def test_a_process_that_does_not_write_leaves_no_file(checkpoints):
    other = dataclasses.replace(checkpoints, writes=False)
    other.save_last(trained_state())
    other.save_best(trained_state())
    assert os.listdir(other.folder) == []


def test_the_one_before_is_kept_and_used_where_the_last_is_damaged(checkpoints):
    folder = checkpoints.folder
    state = trained_state(steps=0)
    for step in range(3):
        state.progress.evaluated_step = step
        checkpoints.save_last(state)
    assert read_last(folder)[1]["progress"]["evaluated_step"] == 2
    assert read_last(folder)[2] is None
    assert read_checkpoint(folder / PREVIOUS)[1]["progress"]["evaluated_step"] == 1

    last = folder / LAST
    last.write_bytes(last.read_bytes()[:-3])
    _, header, warning = read_last(folder)
    assert header["progress"]["evaluated_step"] == 1
    assert LAST in warning
    assert checkpoints.resume(state, may_differ=False) == [warning]
    assert state.progress.evaluated_step == 1

    (folder / PREVIOUS).unlink()
    with pytest.raises(CheckpointError, match=f"nothing to resume from in {folder}"):
        read_last(folder)


def noted_best(step, top1):
    """A state after an evaluation that was the best so far."""
    state = trained_state()
    state.progress.step = step
    state.progress.improve({"top1": top1, "balanced_top1": 0.4, "macro_f1": 0.3, "loss": 1 - top1})
    return state


@pytest.mark.parametrize(("step_of_last", "expected"), [(2, (6, 0.9)), (7, (3, 0.5))])
def test_a_best_that_is_ahead_of_the_last_is_known_to_a_resumed_run(
    checkpoints, step_of_last, expected
):
    """As after a kill between the two, or where the last is damaged."""
    last = noted_best(3, 0.5)
    last.progress.step = step_of_last
    checkpoints.save_last(last)
    checkpoints.save_best(noted_best(6, 0.9))
    fresh = make_state(optimizer=ADAMW, ema_decay=0.9)
    assert checkpoints.resume(fresh, may_differ=False) == []
    progress = fresh.progress
    assert progress.step == step_of_last
    assert (progress.best_step, progress.best_top1) == expected
    assert progress.best()["macro_f1"] == 0.3


@pytest.mark.parametrize("content", [b"cut short", None])
def test_a_best_that_cannot_be_read_gives_way_to_the_next_evaluation(checkpoints, content):
    """Or a run that does not exceed it would come to its end and have no weights to test."""
    state = noted_best(3, 0.5)
    state.progress.evaluated_step = 3
    checkpoints.save_last(state)
    if content is not None:
        (checkpoints.folder / BEST).write_bytes(content)
    fresh = make_state(optimizer=ADAMW, ema_decay=0.9)
    (warning,) = checkpoints.resume(fresh, may_differ=False)
    assert "best.safetensors" in warning
    assert "next evaluation" in warning
    # Its own step's, where that was the last of the run
    assert fresh.progress.evaluated_step == 0
    assert fresh.progress.improve({"top1": 0.1, "balanced_top1": 0, "macro_f1": 0, "loss": 9.0})


def test_other_training_images_are_refused_unless_that_is_allowed(checkpoints):
    checkpoints.save_last(trained_state())
    moved = dataclasses.replace(checkpoints, header={**HEADER, "data": 4321})
    fresh = make_state(optimizer=ADAMW, ema_decay=0.9)
    run_folder = checkpoints.folder.parent
    with pytest.raises(CheckpointError, match=f"resume={run_folder}: .*resume_changed=allow"):
        moved.resume(fresh, may_differ=False)
    assert fresh.progress.step == 0
    assert moved.resume(fresh, may_differ=True) == []
    assert fresh.progress.step == 2


def test_a_checkpoint_without_the_checksum_of_its_images_is_taken(checkpoints):
    """Earlier versions did not write it."""
    checkpoints.save_last(trained_state())
    tensors, header = read_checkpoint(checkpoints.folder / LAST)
    del header["data"], header["threads"]
    write_checkpoint(checkpoints.folder / LAST, tensors, header)
    fresh = make_state(optimizer=ADAMW, ema_decay=0.9)
    assert checkpoints.resume(fresh, may_differ=False) == []


def test_the_images_of_an_earlier_versions_steps_are_counted(checkpoints):
    """It counted steps alone; their batch is that of the checkpoint and not of the resumed run."""
    state = trained_state(steps=3)
    config = {"train": {"batch_size": 40}}
    dataclasses.replace(checkpoints, header=HEADER | {"config": config}).save_last(state)
    tensors, header = read_checkpoint(checkpoints.folder / LAST)
    del header["progress"]["images"]
    write_checkpoint(checkpoints.folder / LAST, tensors, header)

    resumed = make_state(optimizer=ADAMW, ema_decay=0.9)
    checkpoints.resume(resumed, may_differ=False)
    assert resumed.progress.images == 120


def test_the_precision_is_known_before_the_state_is_read(checkpoints):
    folder = checkpoints.folder
    assert checkpoints.precision() is None
    for _ in range(2):
        checkpoints.save_last(trained_state())
    assert checkpoints.precision() == "fp32"
    # The one before, where the last is damaged
    (folder / LAST).write_bytes(b"cut short")
    assert checkpoints.precision() == "fp32"
    (folder / PREVIOUS).unlink()
    assert checkpoints.precision() is None


def test_other_classes_are_refused(checkpoints):
    checkpoints.save_last(trained_state())
    renamed = dataclasses.replace(checkpoints, header={**HEADER, "classes": ["cat", "dog", "wolf"]})
    with pytest.raises(CheckpointError, match=r"fox.*wolf"):
        renamed.resume(make_state(optimizer=ADAMW, ema_decay=0.9), may_differ=False)


def test_another_number_of_threads_is_a_warning(checkpoints):
    checkpoints.save_last(trained_state())
    tensors, header = read_checkpoint(checkpoints.folder / LAST)
    header["threads"] += 3
    write_checkpoint(checkpoints.folder / LAST, tensors, header)
    fresh = make_state(optimizer=ADAMW, ema_decay=0.9)
    (warning,) = checkpoints.resume(fresh, may_differ=False)
    assert f"runtime.threads={header['threads']}" in warning


@pytest.mark.parametrize("key", ["classes", "config", "precision", "progress"])
def test_a_header_that_lacks_something_is_refused(checkpoints, key):
    checkpoints.save_last(trained_state())
    tensors, header = read_checkpoint(checkpoints.folder / LAST)
    del header[key]
    write_checkpoint(checkpoints.folder / LAST, tensors, header)
    with pytest.raises(CheckpointError, match=f"{checkpoints.folder}: .*{key}"):
        checkpoints.resume(make_state(optimizer=ADAMW, ema_decay=0.9), may_differ=False)


def test_classes_must_be_the_data_sets():
    check_classes(["a", "b"], ["a", "b"], "file")
    with pytest.raises(CheckpointError, match=r"file: .*class 1 is 'b' .*'c'"):
        check_classes(["a", "b"], ["a", "c"], "file")
    with pytest.raises(CheckpointError, match=r"file: .*2 there, 3 here"):
        check_classes(["a", "b"], ["a", "b", "c"], "file")
