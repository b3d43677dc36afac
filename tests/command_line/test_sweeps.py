"""Sweeps (-m): every job a process of its own, all of them in one table."""

import csv

import pytest
from helpers import TINY, read_result, train


@pytest.mark.slow
def test_a_sweep_survives_a_failing_job_and_ends_in_a_table(tmp_path):
    done = train(
        tmp_path,
        "-m",
        *TINY,
        "train.steps=12",
        "optimizer.lr=0.002,-1",
        "seed=3",
        "hydra.sweep.dir=my sweep",
    )
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "my sweep" / "summary.md").read_text()
    assert table in done.stdout
    assert "1 of 2 jobs finished" in done.stdout
    with open(tmp_path / "my sweep" / "summary.csv") as file:
        jobs = list(csv.DictReader(file))
    assert [job["status"] for job in jobs] == ["finished", "failed"]
    assert "optimizer.lr=0.002 seed=3" in jobs[0]["overrides"]
    assert "optimizer.lr" in jobs[1]["reason"]
    assert float(jobs[0]["val_top1"]) == read_result(tmp_path / "my sweep" / "0")["val_top1"]
