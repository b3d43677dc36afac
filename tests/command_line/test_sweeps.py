"""Sweeps (-m): every job a process of its own, all of them in one table."""

import csv
from pathlib import Path

import pytest
from helpers import TINY, read_result, start, train, wait_until

SWEEP = [
    "-m",
    *TINY,
    "train.steps=12",
    "optimizer.lr=0.002,-1",
    "seed=3",
    "hydra.sweep.dir=my sweep",
]


def jobs_of(sweep: Path) -> list[dict[str, str]]:
    with open(sweep / "summary.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_sweep_survives_a_failing_job_and_ends_in_a_table(tmp_path):
    """The same command again runs the failed job alone."""
    done = train(tmp_path, *SWEEP)
    assert done.returncode == 0, done.stderr
    sweep = tmp_path / "my sweep"
    assert (sweep / "summary.md").read_text() in done.stdout
    assert "1 of 2 jobs finished" in done.stdout
    finished, failed = jobs_of(sweep)
    assert (finished["status"], failed["status"]) == ("finished", "failed")
    assert "optimizer.lr=0.002 seed=3" in finished["overrides"]
    assert "optimizer.lr" in failed["reason"]
    assert float(finished["val_top1"]) == read_result(sweep / "0")["val_top1"]

    before = [(sweep / job / "result.json").stat().st_mtime_ns for job in ("0", "1")]
    assert train(tmp_path, *SWEEP).returncode == 0
    after = [(sweep / job / "result.json").stat().st_mtime_ns for job in ("0", "1")]
    assert (before[0] == after[0], before[1] == after[1]) == (True, False)
    assert [job["status"] for job in jobs_of(sweep)] == ["finished", "failed"]


@pytest.mark.slow
def test_a_signal_to_the_driver_ends_the_sweep(tmp_path):
    """Its job saves, and no other job is started; the same command resumes it."""
    long = [*SWEEP[:-1], "train.steps=100000", "optimizer.lr=0.002,0.001", "hydra.sweep.dir=long"]
    process = start("train.py", *long, cwd=tmp_path)
    sweep = tmp_path / "long"
    wait_until(lambda: (sweep / "0" / "metrics.jsonl").exists(), process)
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, output + errors
    assert "hydra.sweep.dir=" in errors
    assert [job["status"] for job in jobs_of(sweep)] == ["stopped"]
    assert not (sweep / "1").exists()
