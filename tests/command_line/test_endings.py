"""Runs that end before their last step: without improvement, or at a limit of time."""

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


# More steps of about 20 ms than a start with a limit makes
LONG = [*TINY, "train.epochs=40", "train.eval_every=4", "model.dropout=0.1", "runtime.threads=1"]


def run_a_part(folder, seconds, *arguments, run="parts"):
    """Start or go on with a run within a limit of time that is long enough for some steps.

    The limit is doubled where this machine, busy with other work, does not get to the steps in it.
    Returns the steps made so far.
    """
    before = steps_of(folder / run)
    for _ in range(6):
        minutes = seconds / 60
        done = train(folder, *arguments, f"runtime.max_minutes={minutes:g}")
        seconds *= 2
        # Several processes that have not met yet leave nothing behind
        if not (folder / run / "result.json").exists():
            assert done.returncode == 75, done.stderr
            continue
        result = read_result(folder / run)
        assert result["status"] == "stopped", done.stderr
        assert result["reason"].startswith(f"stopped by runtime.max_minutes={minutes:g}")
        if steps_of(folder / run) > before:
            break
    else:
        pytest.fail(f"no step in {seconds / 2:g} s")
    if "-m" in arguments:
        assert done.returncode == 0, done.stderr
        assert "0 of 1 jobs finished" in done.stdout
        assert f"job 0 stopped: stopped by runtime.max_minutes={minutes:g}" in done.stdout
    else:
        assert f"resume={run}" in error_line(done, 75)
    return steps_of(folder / run)


def steps_of(run):
    """The steps that a run had made when it last ended; 0 before it began."""
    return read_result(run).get("steps", 0) if (run / "result.json").exists() else 0


@pytest.mark.slow
def test_a_run_with_a_limit_of_time_ends_before_it_and_goes_on_to_the_same_bits(tmp_path):
    parts = (*LONG, "resume=auto", "hydra.run.dir=parts")
    run_a_part(tmp_path, 8, *parts)
    rest = train(tmp_path, *parts, "runtime.max_minutes=100")
    assert rest.returncode == 0, rest.stderr
    whole = train(tmp_path, *LONG, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    ours, theirs = (last_tensors(tmp_path / name) for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("parts", "whole")]
    assert metrics[0] == metrics[1]


ENDLESS = (*LONG, "train.epochs=10000")


@pytest.mark.slow
def test_several_processes_end_together_at_the_limit(tmp_path):
    parts = (*ENDLESS, "runtime.processes=2", "resume=auto", "hydra.run.dir=parts")
    assert run_a_part(tmp_path, 14, *parts) > 0


@pytest.mark.long
def test_the_command_of_a_sweep_resumes_the_jobs_that_were_stopped(tmp_path):
    sweep = ("-m", *ENDLESS, "hydra.sweep.dir=sweep")
    first = run_a_part(tmp_path, 10, *sweep, run="sweep/0")
    assert run_a_part(tmp_path, 10, *sweep, run="sweep/0") > first


def test_a_limit_that_starting_up_does_not_fit_into_says_so(tmp_path):
    done = train(tmp_path, *LONG, "runtime.max_minutes=0.001", "hydra.run.dir=run")
    assert "runtime.max_minutes=0.001 before the first step" in error_line(done, 75)
