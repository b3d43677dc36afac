"""train.py as a user runs it: what a run leaves behind, and who can use it."""

import json
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, TINY, error_line, make_images, read_result, rows, run, start, train
from PIL import Image
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vit
from vit.checkpoints.file import read_checkpoint
from vit.runtime.precision import cpu_multiplies_bf16


def test_a_run_learns_and_leaves_its_files(digits_run):
    folder, output = digits_run
    result = read_result(folder)
    assert result["status"] == "finished"
    assert result["val_top1"] > 0.3
    assert result["test_top1"] > 0.3
    expected_keys = {"reason", "best_step", "steps", "params", "seconds", "images_per_second"}
    assert expected_keys <= result.keys()
    # 6 FLOPs a multiply-add: more than those of the weights alone at each of 17 tokens
    images_seen = result["steps"] * 128
    assert result["pflops"] > 6 * result["params"] * images_seen / 1e15
    assert 0 < result["product_rate_share"] < 1

    metrics = rows(folder / "metrics.jsonl")
    losses = [row["loss"] for row in metrics if row["split"] == "train"]
    assert losses[-1] < losses[0] / 1.5
    assert max(row["top1"] for row in metrics if row["split"] == "val") == result["val_top1"]
    assert [row["top1"] for row in metrics if row["split"] == "test"] == [result["test_top1"]]

    files = {path.name for path in (folder / "checkpoints").iterdir()}
    assert files == {"best.safetensors", "last.safetensors", "previous.safetensors"}
    for part in (
        "parameters",
        "GFLOPs",
        "steps",
        "best validation top-1",
        "test top-1",
        "evaluate.py checkpoint=",
        "vit.explore",
        "tensorboard --logdir",
    ):
        assert part in output
    assert "best validation" in (folder / "train.log").read_text()
    assert "\r" not in output  # a progress bar is for terminals


def test_a_first_run_says_nothing_of_fonts(tmp_path):
    # Where matplotlib has not yet noted which fonts there are
    environment = {"MPLCONFIGDIR": str(tmp_path / "matplotlib")}
    done = train(tmp_path, *TINY, "train.steps=1", env=environment, from_scratch=True)
    assert list((tmp_path / "matplotlib").glob("fontlist*"))
    assert "font" not in done.stdout + done.stderr


def test_a_daemon_may_have_no_standard_streams(tmp_path):
    arguments = " ".join([*TINY, "train.steps=1", "hydra.run.dir=run"])
    command = f"exec {sys.executable} {ROOT / 'train.py'} {arguments} <&- >&- 2>&-"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, timeout=240)
    assert done.returncode == 0
    assert read_result(tmp_path / "run")["status"] == "finished"
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line) for line in lines)


def test_tasks_of_srun_are_told_that_each_is_a_run(tmp_path):
    arguments = [*TINY, "train.steps=1", "hydra.run.dir=run"]
    done = train(tmp_path, *arguments, env={"SLURM_STEP_NUM_TASKS": "4"})
    (warning,) = [line for line in done.stdout.splitlines() if "warning" in line]
    assert "srun has started this command 4 times" in warning
    assert "torchrun" in warning
    assert warning in (tmp_path / "run" / "train.log").read_text()


def test_the_curves_are_in_tensorboard(digits_run):
    folder, _ = digits_run
    everything = {"images": 0, "tensors": 0}
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance=everything).Reload()
    tags = events.Tags()
    assert {
        "loss/train",
        "loss/val",
        "top1/val",
        "top5/val",
        "optimizer/learning_rate",
        "optimizer/gradient_norm",
        "speed/images_per_second",
        "speed/MFU",
        "speed/data_wait_share",
        "speed/peak_memory_GiB",
        "result/val_top1",
    } <= set(tags["scalars"])
    assert set(tags["images"]) == {
        "pictures/training images",
        "pictures/attention on validation images",
        "pictures/confusion of the classes",
        "pictures/predictions on validation images",
    }
    assert {
        "configuration/text_summary",
        "pictures/labels of the training images/text_summary",
    } <= set(tags["tensors"])

    metrics = rows(folder / "metrics.jsonl")
    logged = {row["step"]: row["loss"] for row in metrics if row["split"] == "val"}
    curve = {event.step: event.value for event in events.Scalars("loss/val")}
    assert curve == pytest.approx(logged)


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluate_reproduces_what_training_logged(digits_run, tmp_path, split):
    folder, _ = digits_run
    checkpoint = f"checkpoint={folder}/checkpoints/best.safetensors"
    done = run("evaluate.py", checkpoint, f"split={split}", "out=.", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name = "evaluation.json" if split == "test" else "evaluation_val.json"
    evaluation = json.loads((tmp_path / name).read_text())

    result = read_result(folder)
    metrics = [row for row in rows(folder / "metrics.jsonl") if row["split"] == split]
    if split == "val":
        metrics = [row for row in metrics if row["step"] == result["best_step"]]
    (logged,) = metrics
    for key in ("n", "loss", "top1", "top5"):
        assert evaluation[key] == logged[key]
    assert evaluation["top1"] == result[f"{split}_top1"]
    line = rf"top-1 {evaluation['top1']:.2%} \(95 % interval .*n {evaluation['n']}, \d+ images/s"
    assert re.search(line, done.stdout)


def test_the_checkpoint_works_from_python(digits_run):
    folder, _ = digits_run
    model = vit.load(folder / "checkpoints" / "best.safetensors")
    assert model.classes == [str(digit) for digit in range(10)]
    pixels, labels = load_digits(return_X_y=True)
    gray = (pixels[:300].reshape(-1, 8, 8) / 16 * 255).round().astype("uint8")
    inputs = torch.stack([model.preprocessing(Image.fromarray(image)) for image in gray])
    with torch.no_grad():
        logits = model(inputs)
    assert (logits.argmax(1).numpy() == labels[:300]).mean() > 0.3


def test_one_s_own_folder_of_images(tmp_path):
    """Trained, evaluated where the folder has moved to, and refused where its classes differ."""
    images = "my pictures (ü)"
    make_images(tmp_path / images, {"train": 40, "test": 10}, ("cat", "dog", "fox"))
    done = train(
        tmp_path,
        "data=folder",
        f"data.root={images}",
        "model=vit_nano4",
        "model.num_channels=3",
        "model.num_layers=2",
        "train.epochs=4",
        "train.batch_size=16",
        "optimizer.lr=0.002",
        "runtime.workers=1",
        "hydra.run.dir=run",
        "data.interpolation=bilinear",
    )
    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path / "run")
    assert result["test_top1"] > 0.9
    _, header = read_checkpoint(tmp_path / "run" / "checkpoints" / "best.safetensors")
    assert header["classes"] == ["cat", "dog", "fox"]

    (tmp_path / images).rename(tmp_path / "moved")
    command = ["evaluate.py", "checkpoint=run/checkpoints/best.safetensors"]
    assert images in error_line(run(*command, cwd=tmp_path))
    done = run(*command, "data.root=moved", "out=elsewhere", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((tmp_path / "elsewhere" / "evaluation.json").read_text())
    assert evaluation["top1"] == result["test_top1"]

    (tmp_path / "moved" / "test" / "fox").rename(tmp_path / "moved" / "test" / "wolf")
    assert "fox" in error_line(run(*command, "data.root=moved", cwd=tmp_path))


@pytest.mark.slow
def test_other_settings(tmp_path):
    """Compiled, mean pooling, no validation split, SGD, RandAugment, micro-batches, noise."""
    # Without hardware for it, bf16 is a hundred times slower
    precision = "bf16" if cpu_multiplies_bf16() else "fp32"
    done = train(
        tmp_path,
        "data=synthetic",
        "data.num_images=32",
        "data.num_classes=4",
        "data.val_fraction=0",
        "model=vit_nano4",
        "model.num_layers=1",
        "model.hidden_size=16",
        "model.num_heads=1",
        "model.global_pool=mean",
        "optimizer=sgd",
        "optimizer.lr=0.1",
        "augment=strong",
        f"train.precision={precision}",
        "train.batch_size=16",
        "train.micro_batch_size=8",
        "train.steps=2",
        "train.ema_decay=0",
        "runtime.compile=true",
        "schedule=linear",
        "hydra.run.dir=run",
    )
    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path / "run")
    assert (result["val_top1"], result["best_step"]) == (None, 2)
    assert "nothing held out" in done.stdout


def test_attention_is_drawn_while_training(tmp_path):
    done = train(tmp_path, *TINY, "train.epochs=2", "train.attention_every=1", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    folder = str(tmp_path / "run" / "tensorboard")
    events = EventAccumulator(folder, size_guidance={"images": 0}).Reload()
    images = events.Images("pictures/attention on validation images")
    assert [event.step for event in images] == [9, 18]


def test_explain_prints_shapes_and_costs_and_stops(tmp_path):
    done = train(
        tmp_path,
        "explain=true",
        "data=synthetic",
        "data.num_classes=10",
        "data.num_images=100",
        "model=vit_ti4",
        "model.num_layers=2",
        "model.representation_size=192",
        "train.batch_size=8",
    )
    assert done.returncode == 0, done.stderr
    for part in (
        "(8, 3, 32, 32)",
        "(8, 64, 192)",
        "(8, 65, 192)",
        "(8, 192)",
        "(8, 10)",
        "GMACs",
        "MiB",
        "80 images",
    ):
        assert part in done.stdout
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_help_is_for_people(tmp_path):
    done = run("train.py", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for part in ("experiment=digits", "vit_b16", "cifar100", "resume=", "batch_size: 64"):
        assert part in done.stdout
    assert "schema" not in done.stdout
    assert "checkpoint=" in run("evaluate.py", "--help", cwd=tmp_path).stdout
    job = run("train.py", "--cfg", "job", "model.patch_size=8", cwd=tmp_path)
    assert "patch_size: 8" in job.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_where_nobody_reads_its_lines(tmp_path):
    # As with `| head -1`, or where the tee of a log has been killed
    with start("train.py", *TINY, "hydra.run.dir=run", cwd=tmp_path) as process:
        assert process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert errors == ""
    assert read_result(tmp_path / "run")["status"] == "finished"
    assert "test top-1" in (tmp_path / "run" / "train.log").read_text()
