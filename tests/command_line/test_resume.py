"""Runs that were stopped and resumed, and run folders that are in use."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, TINY, error_line, read_result, train, train_to_step

from vit.checkpoints.file import read_checkpoint

# Everything that a resumed run must have kept: optimizer, average, order, dropout, augmentation
RUN = [*TINY, "train.epochs=5", "train.log_every=1", "augment.pad=0.125", "model.dropout=0.1"]
STEPS = 45
HOLD_FOLDER = """
import sys, time
from pathlib import Path
from vit.runs.folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_stopped_run_is_resumed(tmp_path):
    """SIGTERM in the middle, then resume: everything continues as if nothing had happened."""
    done = train(tmp_path, *RUN, "hydra.run.dir=whole")
    assert done.returncode == 0, done.stderr
    expected_metrics = (tmp_path / "whole" / "metrics.jsonl").read_text()

    process = train_to_step(12, *RUN, "hydra.run.dir=parts", cwd=tmp_path, run="parts")
    metrics = tmp_path / "parts" / "metrics.jsonl"
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, output + errors
    assert "resume=" in errors
    assert read_result(tmp_path / "parts")["status"] == "stopped"
    _, header = read_checkpoint(tmp_path / "parts" / "checkpoints" / "last.safetensors")
    step = header["progress"]["step"]
    assert 0 < step < STEPS

    # A row that was logged after the checkpoint is dropped
    stray = {"step": step + 1, "split": "train", "loss": -1}
    metrics.write_text(metrics.read_text() + json.dumps(stray) + "\n")
    resumed = train(tmp_path, "resume=parts")
    assert resumed.returncode == 0, resumed.stderr
    assert f"after step {step}" in resumed.stdout
    assert metrics.read_text() == expected_metrics
    for name in ("best", "last"):
        ours, theirs = (
            read_checkpoint(tmp_path / folder / "checkpoints" / f"{name}.safetensors")[0]
            for folder in ("parts", "whole")
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for key in ("val_top1", "test_top1", "best_step", "steps"):
        assert read_result(tmp_path / "parts")[key] == read_result(tmp_path / "whole")[key]

    # What is refused leaves the finished run alone, and resuming it changes nothing
    changed = error_line(train(tmp_path, "resume=parts", "train.epochs=9"))
    assert "train.epochs: 5.0 → 9.0" in changed
    again = train(tmp_path, "resume=auto", *RUN, "hydra.run.dir=parts")
    assert again.returncode == 0, again.stderr
    occupied = error_line(train(tmp_path, *RUN, "hydra.run.dir=parts"))
    assert "parts" in occupied
    assert "resume=" in occupied
    assert read_result(tmp_path / "parts")["status"] == "finished"
    assert metrics.read_text() == expected_metrics


def test_a_folder_in_use_is_refused(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_FOLDER, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        line = error_line(train(tmp_path, *TINY, "hydra.run.dir=run"))
        assert f"process {holder.pid} on" in line
        holder.kill()
    # The lock of a dead process is none
    done = train(tmp_path, *TINY, "train.steps=1", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr


def test_every_step_counts_the_images_of_its_own_batch(tmp_path):
    """A run that goes on with a smaller batch: its speed and its compute are those of both."""
    settings = [*TINY, "train.steps=4", "hydra.run.dir=run"]
    first = train(tmp_path, *settings)
    assert first.returncode == 0, first.stderr
    before = read_result(tmp_path / "run")
    changes = ("train.batch_size=64", "train.steps=6", "resume_changed=allow")
    resumed = train(tmp_path, "resume=run", *changes)
    assert resumed.returncode == 0, resumed.stderr

    images = 4 * 128 + 2 * 64
    after = read_result(tmp_path / "run")
    assert after["pflops"] / before["pflops"] == pytest.approx(images / (4 * 128), rel=1e-3)
    assert after["images_per_second"] * after["seconds"] == pytest.approx(images, rel=0.02)
