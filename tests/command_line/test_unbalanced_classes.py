"""A folder of 60 images of one class and 12 of another, from the first line to the last."""

import json
from pathlib import Path

import pytest
import torch
from helpers import error_line, make_images, read_result, rows, run, train, train_to_step

from vit.checkpoints.file import read_checkpoint

RUN = [
    "data=folder",
    "data.root=../images",
    "data.val_fraction=0.2",
    "data.test_fraction=0.2",
    "model=vit_nano4",
    "model.image_size=8",
    "model.hidden_size=16",
    "model.num_layers=1",
    "model.num_heads=2",
    "augment=none",
    "train.batch_size=8",
    "train.epochs=4",
    "train.log_every=1",
    "train.precision=fp32",
    "train.attention_every=null",
    "runtime.workers=0",
    "runtime.threads=1",
    "hydra.run.dir=run",
]
BALANCED = [
    *RUN,
    "data.balance=0.5",
    "train.class_weights=balanced",
    "train.select=macro_f1",
    "train.eval_every=0.5",
    "train.save_every=3",
    "optimizer.lr=0.01",
]
STEPS = 23

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("unbalanced")
    make_images(root / "made", {"train": 60}, size=(8, 8))
    (root / "made" / "train").rename(root / "images")
    for number in range(12, 60):
        (root / "images" / "dog" / f"{number}.jpg").unlink()
    return root


def begin(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def whole(root) -> Path:
    """A run of one process that was never stopped."""
    folder = begin(root, "whole")
    done = train(folder, *BALANCED)
    assert done.returncode == 0, done.stderr
    assert "best validation macro F1" in done.stdout
    return folder / "run"


def test_the_larger_class_alone_is_found_out(root):
    folder = begin(root, "plain")
    done = train(folder, *RUN, "optimizer.lr=1e-9")
    assert done.returncode == 0, done.stderr
    (note,) = [line for line in done.stdout.splitlines() if line.startswith("note ")]
    assert "38 cat, 8 dog" in note
    assert "data.balance" in note
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("test top-1")]
    result = read_result(folder / "run")
    assert f"balanced accuracy {result['test_balanced_top1']:.2%}" in line
    assert "always cat would be 85.71%" in line
    assert "test balanced accuracy" in (folder / "run" / "card.md").read_text()

    evaluated = run("evaluate.py", "checkpoint=run/checkpoints/best.safetensors", cwd=folder)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "always cat would have top-1 85.71%" in evaluated.stdout
    numbers = json.loads((folder / "run" / "evaluation.json").read_text())
    for name in ("top1", "balanced_top1", "macro_f1"):
        assert numbers[name] == result[f"test_{name}"]


def test_the_best_checkpoint_is_the_best_in_what_was_selected_by(whole):
    validation = [row for row in rows(whole / "metrics.jsonl") if row["split"] == "val"]
    best = max(validation, key=lambda row: (row["macro_f1"], -row["loss"], -row["step"]))
    result = read_result(whole)
    assert (result["select"], result["best_step"]) == ("macro_f1", best["step"])
    for name in ("top1", "balanced_top1", "macro_f1", "loss"):
        assert result[f"val_{name}"] == best[name]


def test_a_killed_run_resumes_to_the_same_bits(root, whole):
    folder = begin(root, "parts")
    process = train_to_step(13, *BALANCED, cwd=folder, run="run")
    metrics = folder / "run" / "metrics.jsonl"
    process.kill()
    process.communicate(timeout=60)
    _, header = read_checkpoint(folder / "run" / "checkpoints" / "last.safetensors")
    assert 0 < header["progress"]["step"] < STEPS

    # The same is not said by another measure, unless that is asked for
    refused = error_line(train(folder, "resume=run", "train.select=loss"))
    assert "train.select: macro_f1 → loss" in refused
    resumed = train(folder, "resume=run")
    assert resumed.returncode == 0, resumed.stderr
    assert metrics.read_text() == (whole / "metrics.jsonl").read_text()
    for name in ("best", "last"):
        path = Path("checkpoints") / f"{name}.safetensors"
        ours, theirs = (read_checkpoint(part / path)[0] for part in (folder / "run", whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_two_processes_train_and_measure_the_same(root, whole):
    folder = begin(root, "two")
    done = train(folder, *BALANCED, "runtime.processes=2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("note   unbalanced classes") == 1
    ours, theirs = rows(folder / "run" / "metrics.jsonl"), rows(whole / "metrics.jsonl")
    assert len(ours) == len(theirs)
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    # Before the steps have drifted apart, the processes count what one counts
    first = [next(row for row in part if row["split"] == "val") for part in (ours, theirs)]
    for name in ("n", "top1", "balanced_top1", "macro_f1"):
        assert first[0][name] == pytest.approx(first[1][name])


def test_what_the_classes_leave_nothing_to_do_is_refused(root):
    folder = begin(root, "refused")
    digits = ["data.limit=40", "hydra.run.dir=run", "runtime.threads=1"]
    line = error_line(train(folder, "experiment=digits", *digits, "data.balance=1"))
    assert "data.balance does nothing here" in line
    none = train(folder, *RUN, "data.val_fraction=0", "train.select=loss")
    assert "train.select does nothing here" in error_line(none)
    assert not (folder / "run").exists()
