"""Sweeps (-m): every job a process of its own, all of them in one table."""

import csv
import re
from pathlib import Path

import pytest
from helpers import TINY, error_line, read_result, start, train, wait_until

SWEEP = [
    "-m",
    *TINY,
    "train.steps=12",
    "optimizer.lr=0.002,-1",
    "seed=3",
    "hydra.sweep.dir=my sweep",
]

MODEL = """
name: my model
image_size: 32
patch_size: 8
hidden_size: 32
num_layers: 1
num_heads: 2
"""


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
def test_the_jobs_of_a_sweep_find_files_outside_the_project(tmp_path):
    """So do the processes of a job, and whoever repeats one by its card."""
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "mine.yaml").write_text(MODEL)
    own = [
        "--config-dir=own",
        "experiment=digits",
        "model=mine",
        "train.steps=2",
        "runtime.processes=1,2",
        "runtime.threads=1",
    ]
    done = train(tmp_path, "-m", *own, "hydra.sweep.dir=sweep")
    assert "2 of 2 jobs finished" in done.stdout, done.stderr
    for job in ("0", "1"):
        config = (tmp_path / "sweep" / job / "config.yaml").read_text()
        assert config.startswith(f"# python train.py --config-dir={tmp_path / 'own'} ")
        assert "name: my model" in config


def test_a_file_that_the_project_hides_is_refused(tmp_path):
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "vit_s4.yaml").write_text(MODEL)
    done = train(tmp_path, "--config-dir=own", "experiment=digits", "model=vit_s4")
    assert re.search(r"own/model/vit_s4\.yaml .*conf/model/vit_s4\.yaml", error_line(done))
    assert list((tmp_path / "outputs").iterdir()) == []


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
