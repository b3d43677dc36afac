"""train.teacher as a user types it: killed processes, moved files, several processes."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import TINY, error_line, make_images, read_result, rows, run, train, train_to_step

from vit.checkpoints.file import read_checkpoint
from vit.checkpoints.model import build_on_meta, load
from vit.config.config import from_dict, read_config_file
from vit.model.cost import forward_flops, training_flops
from vit.weights.identity import sha256_of

STUDENT = [
    *TINY,
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.num_heads=2",
    "train.log_every=1",
    "runtime.threads=1",
]
RUN = [
    *STUDENT,
    "model.distill_token=true",
    "model.dropout=0.1",
    "augment.mixup=0.2",
    "train.distillation=soft",
    "train.epochs=4",
    "train.save_every=2",
]


@pytest.fixture
def teacher(tmp_path, digits_run) -> Path:
    """A checkpoint on its own, in a place with characters of Hydra's grammar."""
    path = tmp_path / "a teacher, (good)" / "best.safetensors"
    path.parent.mkdir()
    shutil.copy(digits_run[0] / "checkpoints" / "best.safetensors", path)
    return path


def tensors_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "checkpoints" / f"{name}.safetensors")[0]


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_teacher_to_the_same_bits(tmp_path, teacher, digits_run):
    done = train(tmp_path, *RUN, f"train.teacher={teacher}", "hydra.run.dir=whole")
    assert done.returncode == 0, done.stderr

    parts = [*RUN, f"train.teacher={teacher}", "hydra.run.dir=parts"]
    process = train_to_step(8, *parts, cwd=tmp_path, run="parts")
    metrics = tmp_path / "parts" / "metrics.jsonl"
    process.kill()
    process.communicate()
    step = read_checkpoint(tmp_path / "parts/checkpoints/last.safetensors")[1]["progress"]["step"]
    assert 0 < step < 36

    # Another one in its place is none, nor is going on without
    other = digits_run[0] / "checkpoints" / "last.safetensors"
    moved = teacher.rename(tmp_path / "moved.safetensors")
    shutil.copy(other, teacher)
    line = error_line(train(tmp_path, "resume=parts"))
    assert f"train.teacher={teacher}" in line
    assert sha256_of(moved, is_own=True)[:16] in line
    assert "train.teacher: " in error_line(train(tmp_path, "resume=parts", "train.teacher=null"))
    teacher.unlink()
    assert "train.teacher=FILE" in error_line(train(tmp_path, "resume=parts"))

    resumed = train(tmp_path, "resume=parts", f"train.teacher={moved}")
    assert resumed.returncode == 0, resumed.stderr
    assert f"after step {step}" in resumed.stdout
    assert metrics.read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    for name in ("best", "last"):
        ours, theirs = (tensors_of(tmp_path / folder, name) for folder in ("parts", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_student_is_used_without_its_teacher_and_says_who_taught_it(tmp_path, teacher):
    overrides = [*STUDENT, "train.steps=2", f"train.teacher={teacher}"]
    explained = train(tmp_path, *overrides, "explain=true")
    assert explained.returncode == 0, explained.stderr
    done = train(tmp_path, *overrides, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    sha256 = sha256_of(teacher, is_own=True)

    # Its cost: forward alone, beside the forward and backward passes of the student
    config = from_dict(read_config_file(tmp_path / "run" / "config.yaml"), "config.yaml")
    student, taught_by = build_on_meta(asdict(config.model), 10), load(teacher)
    flops = 2 * 128 * (training_flops(student) + forward_flops(taught_by))
    assert read_result(tmp_path / "run")["pflops"] == pytest.approx(flops / 1e15, rel=1e-4)
    for output in (explained.stdout, done.stdout):
        (line,) = [line for line in output.splitlines() if line.startswith("teacher ")]
        assert "of a step's work; hard distillation, 0.5 of the loss" in line
    assert ", teacher " in explained.stdout
    card = (tmp_path / "run" / "card.md").read_text()
    assert "## Teacher" in card
    assert sha256 in card

    teacher.unlink()
    checkpoint = tmp_path / "run" / "checkpoints" / "best.safetensors"
    tensors, header = read_checkpoint(checkpoint)
    assert header["teacher"] == {"name": str(teacher), "sha256": sha256}
    assert tensors.keys() == load(checkpoint).state_dict().keys()
    evaluated = run("evaluate.py", f"checkpoint={checkpoint}", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["top1"] == read_result(tmp_path / "run")["test_top1"]


def test_a_teacher_of_other_classes_is_refused(tmp_path, teacher):
    images = make_images(tmp_path / "images", {"train": 12, "test": 2})
    data = ["data=folder", f"data.root={images}", "train.batch_size=8", "runtime.workers=0"]
    line = error_line(train(tmp_path, "model=vit_nano4", *data, f"train.teacher={teacher}"))
    assert "train.teacher: " in line
    assert "does not know 2 of the data set's 2 classes by their names: cat, dog" in line


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", pytest.param("fsdp", marks=pytest.mark.long)])
def test_every_process_asks_a_teacher_of_its_own(tmp_path, teacher, sharding):
    """The losses are those of one process, whose sums were added in another order."""
    overrides = [*STUDENT, "model.distill_token=true", "train.steps=12", "train.precision=fp32"]
    overrides += [f"train.teacher={teacher}", "train.distillation=soft", "optimizer=sgd"]
    losses = []
    for count, kind in ((1, "none"), (2, sharding)):
        own = [
            f"runtime.processes={count}",
            f"runtime.sharding={kind}",
            f"hydra.run.dir=run{count}",
        ]
        done = train(tmp_path, *overrides, *own)
        assert done.returncode == 0, done.stderr
        metrics = rows(tmp_path / f"run{count}" / "metrics.jsonl")
        losses.append([row["loss"] for row in metrics if row["split"] == "train"])
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
