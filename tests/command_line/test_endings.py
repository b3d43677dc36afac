"""Runs that end before their last step: without improvement, or at a limit of time."""

import time

import pytest
import torch
from helpers import TINY, error_line, read_result, train

from vit.checkpoints.file import read_checkpoint

# An evaluation every two steps; a learning rate that moves the optimizer's state and no weight
STALE = [*TINY, "train.eval_every=0.25", "train.epochs=4", "optimizer.lr=1e-60"]


def last_tensors(run):
    return read_checkpoint(run / "checkpoints" / "last.safetensors")[0]


def test_a_run_without_improvement_ends_finished_and_goes_on_with_more_patience(tmp_path):
    done = train(tmp_path, *STALE, "train.patience=2", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path / "run")
    assert result["status"] == "finished"
    assert result["reason"].startswith("train.patience=2: no improvement since step 3")
    assert (result["steps"], result["best_step"]) == (7, 3)
    assert result["test_top1"] is not None
    assert "ended early: train.patience=2" in done.stdout
    assert "ended after step 7" in (tmp_path / "run" / "card.md").read_text()

    # The same patience would end it where it is
    for unchanged in ([], ["train.patience=1"]):
        line = error_line(train(tmp_path, "resume=run", *unchanged))
        assert "train.patience=null" in line
    assert read_result(tmp_path / "run") == result

    resumed = train(tmp_path, "resume=run", "train.patience=4")
    assert resumed.returncode == 0, resumed.stderr
    whole = train(tmp_path, *STALE, "train.patience=4", "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    ours, theirs = (last_tensors(tmp_path / name) for name in ("run", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read_result(tmp_path / "run")["steps"] == 12
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "whole")]
    assert metrics[0] == metrics[1]


def test_patience_is_refused_where_nothing_is_held_out(tmp_path):
    arguments = [*TINY, "train.patience=2", "data.val_fraction=0", "hydra.run.dir=run"]
    assert "train.patience" in error_line(train(tmp_path, *arguments))


# Steps of about 20 ms, of which a start makes a part
LONG = [*TINY, "train.epochs=40", "train.eval_every=4", "model.dropout=0.1", "runtime.threads=1"]


def seconds_of_a_start(folder, *arguments):
    """How long a run of one step takes, which is nearly all starting up and ending."""
    began = time.monotonic()
    done = train(folder, *arguments, *LONG, "train.steps=1", "hydra.run.dir=short")
    assert done.returncode == 0, done.stderr
    return time.monotonic() - began


def run_in_time(folder, minutes, *arguments):
    """One start of the run within a limit of time; its exit code."""
    limit = (f"runtime.max_minutes={minutes}", "resume=auto", "hydra.run.dir=parts")
    began = time.monotonic()
    done = train(folder, *LONG, *arguments, *limit)
    assert time.monotonic() - began < 60 * minutes
    result = read_result(folder / "parts")
    if done.returncode == 75:
        assert "resume=parts" in error_line(done, 75)
        assert result["status"] == "stopped"
        assert result["reason"].startswith(f"stopped by runtime.max_minutes={minutes:g}")
    else:
        assert done.returncode == 0, done.stderr
        assert result["status"] == "finished"
    return done.returncode


def minutes_for_a_part(folder, *arguments):
    """A limit that leaves a start a few seconds for its steps."""
    return round((1.5 * seconds_of_a_start(folder, *arguments) + 4) / 60, 3)


@pytest.mark.slow
def test_a_run_with_a_limit_of_time_ends_before_it_and_goes_on_to_the_same_bits(tmp_path):
    minutes = minutes_for_a_part(tmp_path)
    assert run_in_time(tmp_path, minutes) == 75, "the run is too short for this test"
    run_in_time(tmp_path, minutes)
    assert run_in_time(tmp_path, 100) == 0
    whole = train(tmp_path, *LONG, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    ours, theirs = (last_tensors(tmp_path / name) for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("parts", "whole")]
    assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_several_processes_end_together_before_the_limit(tmp_path):
    endless = ("train.epochs=1000", "runtime.processes=2")
    minutes = minutes_for_a_part(tmp_path, *endless)
    steps = []
    for _ in range(2):
        assert run_in_time(tmp_path, minutes, *endless) == 75
        steps.append(read_result(tmp_path / "parts")["steps"])
    assert 0 < steps[0] < steps[1]


@pytest.mark.slow
def test_the_command_of_a_sweep_resumes_the_jobs_that_were_stopped(tmp_path):
    minutes = minutes_for_a_part(tmp_path, "-m")
    endless = ("train.epochs=1000", f"runtime.max_minutes={minutes}", "hydra.sweep.dir=sweep")
    steps = []
    for _ in range(2):
        done = train(tmp_path, "-m", *LONG, *endless)
        assert done.returncode == 0, done.stderr
        assert "0 of 1 jobs finished" in done.stdout
        assert f"job 0 stopped: stopped by runtime.max_minutes={minutes:g}" in done.stdout
        steps.append(read_result(tmp_path / "sweep" / "0")["steps"])
    assert 0 < steps[0] < steps[1]


def test_a_limit_that_starting_up_does_not_fit_into_says_so(tmp_path):
    done = train(tmp_path, *LONG, "runtime.max_minutes=0.001", "hydra.run.dir=run")
    assert "runtime.max_minutes=0.001 before the first step" in error_line(done, 75)
