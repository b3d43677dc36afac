"""Runs that end before their last step: without improvement, or at a limit of time."""

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
