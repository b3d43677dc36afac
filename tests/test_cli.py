"""The command line as a user runs it: real processes, real files."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, TINY, make_images, rows, run, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vit
from vit.checkpoints.file import read_checkpoint


def told(done, *, code=2):
    """The one line a mistake ends in: the right exit code, no traceback."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_run_learns_and_leaves_its_files(digits_run):
    folder, output = digits_run
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["val_top1"] > 0.3
    assert result["test_top1"] > 0.3
    assert {
        "reason",
        "best_step",
        "steps",
        "params",
        "seconds",
        "images_per_second",
    } <= result.keys()
    metrics = rows(folder / "metrics.jsonl")
    losses = [row["loss"] for row in metrics if row["split"] == "train"]
    assert losses[-1] < losses[0] / 1.5
    assert max(row["top1"] for row in metrics if row["split"] == "val") == result["val_top1"]
    assert [row["top1"] for row in metrics if row["split"] == "test"] == [result["test_top1"]]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "best.safetensors",
        "last.safetensors",
        "previous.safetensors",
    }
    for part in (
        "parameters",
        "GFLOPs",
        "steps",
        "best validation top-1",
        "test top-1",
        "evaluate.py checkpoint=",
        "tensorboard --logdir",
        "data=cifar10",
    ):
        assert part in output
    assert "best validation" in (folder / "train.log").read_text()
    assert "\r" not in output  # no bar where output is no terminal


def test_curves_stand_in_tensorboard(digits_run):
    folder, _ = digits_run
    events = EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"images": 0, "tensors": 0}
    ).Reload()
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
    values = {
        row["step"]: row["loss"] for row in rows(folder / "metrics.jsonl") if row["split"] == "val"
    }
    assert {
        event.step: pytest.approx(event.value) for event in events.Scalars("loss/val")
    } == values


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluate_reproduces_what_training_logged(digits_run, split):
    folder, _ = digits_run
    done = run(
        "evaluate.py",
        f"checkpoint={folder}/checkpoints/best.safetensors",
        f"split={split}",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    evaluation = json.loads(
        (folder / ("evaluation.json" if split == "test" else "evaluation_val.json")).read_text()
    )
    result = json.loads((folder / "result.json").read_text())
    logged = next(
        row
        for row in rows(folder / "metrics.jsonl")
        if row["split"] == split and (split == "test" or row["step"] == result["best_step"])
    )
    numbers = ("n", "loss", "top1", "top5")
    assert {key: evaluation[key] for key in numbers} == {key: logged[key] for key in numbers}
    assert evaluation["top1"] == result[f"{split}_top1"]
    assert re.search(
        rf"top-1 {evaluation['top1']:.2%} \(95 % interval .*n {evaluation['n']}, \d+ images/s",
        done.stdout,
    )


def test_the_checkpoint_works_from_python(digits_run):
    folder, _ = digits_run
    model = vit.load(folder / "checkpoints" / "best.safetensors")
    assert model.classes == [str(digit) for digit in range(10)]
    from PIL import Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pictures = [
        Image.fromarray((image.reshape(8, 8) / 16 * 255).round().astype("uint8"))
        for image in images[:300]
    ]
    with torch.no_grad():
        logits = model(torch.stack([model.preprocessing(picture) for picture in pictures]))
    assert (logits.argmax(1).numpy() == labels[:300]).mean() > 0.3


def test_a_stopped_run_is_resumed(tmp_path):
    """SIGTERM in the middle, then resume: step, optimizer, average and order go on as if nothing had happened."""
    options = [
        *TINY,
        "train.epochs=8",
        "train.log_every=1",
        "augment.pad=0.125",
        "model.dropout=0.1",
    ]
    whole = train(tmp_path, *options, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *options, "hydra.run.dir=parts"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "parts" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 12):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, output + errors
    assert "resume=" in errors
    assert json.loads((tmp_path / "parts" / "result.json").read_text())["status"] == "stopped"
    step = read_checkpoint(tmp_path / "parts" / "checkpoints" / "last.safetensors")[1]["progress"][
        "step"
    ]
    assert 0 < step < 72
    metrics.write_text(
        metrics.read_text() + json.dumps({"step": step + 1, "split": "train", "loss": -1}) + "\n"
    )
    resumed = train(tmp_path, "resume=parts")
    assert resumed.returncode == 0, resumed.stderr
    assert f"after step {step}" in resumed.stdout
    assert metrics.read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    for name in ("best", "last"):
        ours, theirs = (
            read_checkpoint(tmp_path / folder / "checkpoints" / f"{name}.safetensors")[0]
            for folder in ("parts", "whole")
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    results = [
        json.loads((tmp_path / folder / "result.json").read_text()) for folder in ("parts", "whole")
    ]
    assert all(
        results[0][key] == results[1][key]
        for key in ("val_top1", "test_top1", "best_step", "steps")
    )

    assert "train.epochs: 8.0 → 9.0" in told(train(tmp_path, "resume=parts", "train.epochs=9"))
    again = train(tmp_path, "resume=auto", *options, "hydra.run.dir=parts")
    assert again.returncode == 0, again.stderr
    assert "holds a run already" in told(train(tmp_path, *options, "hydra.run.dir=parts"))
    assert (
        json.loads((tmp_path / "parts" / "result.json").read_text())["status"] == "finished"
    )  # a refusal leaves it alone
    assert metrics.read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


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
    assert "optimizer.lr must be a positive number" in jobs[1]["reason"]
    result = json.loads((tmp_path / "my sweep" / "0" / "result.json").read_text())
    assert float(jobs[0]["val_top1"]) == result["val_top1"]


def test_ones_own_folder_of_pictures(tmp_path):
    make_images(tmp_path / "my pictures (ü)", {"train": 40, "test": 10}, ("cat", "dog", "fox"))
    done = train(
        tmp_path,
        "data=folder",
        "data.root=my pictures (ü)",
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
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test_top1"] > 0.9
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "best.safetensors")[1]["classes"] == [
        "cat",
        "dog",
        "fox",
    ]
    (tmp_path / "my pictures (ü)").rename(tmp_path / "moved")
    assert "no folder" in told(
        run("evaluate.py", "checkpoint=run/checkpoints/best.safetensors", cwd=tmp_path)
    )
    done = run(
        "evaluate.py",
        "checkpoint=run/checkpoints/best.safetensors",
        "data.root=moved",
        "out=elsewhere",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((tmp_path / "elsewhere" / "evaluation.json").read_text())["top1"]
        == result["test_top1"]
    )
    (tmp_path / "moved" / "test" / "fox").rename(tmp_path / "moved" / "test" / "wolf")
    assert "lacks fox" in told(
        run(
            "evaluate.py",
            "checkpoint=run/checkpoints/best.safetensors",
            "data.root=moved",
            cwd=tmp_path,
        )
    )


def test_other_settings_run(tmp_path):
    """bf16, compiled where there is a compiler, mean pooling, no validation split, SGD, RandAugment, micro-steps, noise."""
    done = train(
        tmp_path,
        "data=synthetic",
        "data.num_images=64",
        "data.num_classes=4",
        "data.val_fraction=0",
        "model=vit_nano4",
        "model.num_layers=1",
        "model.global_pool=mean",
        "optimizer=sgd",
        "optimizer.lr=0.1",
        "augment=strong",
        "train.precision=bf16",
        "train.batch_size=16",
        "train.micro_batch_size=8",
        "train.steps=3",
        "train.ema_decay=0",
        "runtime.compile=true",
        "schedule=linear",
        "hydra.run.dir=run",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["val_top1"], result["best_step"]) == (None, 3)
    assert "nothing held out" in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.py", ["optimizer.lrr=1"], "did you mean optimizer.lr"),
        ("train.py", ["model=vit_b17"], "did you mean vit_b16"),
        ("train.py", ["optimizer.lr=-1"], "optimizer.lr must be a positive number"),
        (
            "train.py",
            ["model.num_heads=5"],
            "num_heads must be positive and divide hidden_size 384, got 5",
        ),
        ("train.py", ["model.patch_size=5"], "patch_size 5x5 does not divide image_size 32x32"),
        (
            "train.py",
            ["experiment=digits", "train.batch_size=5000"],
            "train.batch_size=5000 is more than the 1151 training images",
        ),
        (
            "train.py",
            ["experiment=digits", "train.steps=10", "schedule.warmup=10"],
            "schedule.warmup",
        ),
        ("train.py", ["data=imagenet"], "no folder"),
        ("train.py", ["data=folder"], "needs data.root=FOLDER"),
        ("train.py", ["resume=nowhere"], "no checkpoint in"),
        ("train.py", ["hydra.run.dir=/proc/nowhere"], "can't make this run folder"),
        ("train.py", ["runtime.device=cuda"], "runtime.device=cuda: this machine has none"),
        ("evaluate.py", [], "give checkpoint="),
        ("evaluate.py", ["checkpoint=nowhere.safetensors"], "no such checkpoint file"),
        ("evaluate.py", ["split=tset"], "expected one of"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, script, arguments, message):
    if "runtime.device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert message in told(run(script, *arguments, cwd=tmp_path))
    assert not any(path.name != "data" for path in tmp_path.rglob("*") if path.is_file()), (
        "a refused command leaves no files"
    )


def test_damaged_checkpoints_are_refused(digits_run, tmp_path):
    best = (digits_run[0] / "checkpoints" / "best.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(best[:-100])
    assert "cut.safetensors: not a whole safetensors file" in told(
        run("evaluate.py", "checkpoint=cut.safetensors", cwd=tmp_path)
    )
    last = digits_run[0] / "checkpoints" / "last.safetensors"
    assert "use best.safetensors" in told(run("evaluate.py", f"checkpoint={last}", cwd=tmp_path))


def test_a_folder_in_use_is_refused(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from vit.runs.folder import RunFolder; "
        "folder = RunFolder(Path(sys.argv[1]));print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert f"in use by another run (process {holder.pid} on" in told(
            train(tmp_path, *TINY, "hydra.run.dir=run")
        )
    finally:
        holder.kill()
        holder.wait()
    assert (
        train(tmp_path, *TINY, "train.steps=1", "hydra.run.dir=run").returncode == 0
    )  # the lock of a dead process is none


def test_divergence_is_told_and_the_last_good_checkpoint_kept(tmp_path):
    done = train(
        tmp_path,
        *TINY,
        "train.steps=60",
        "optimizer=sgd",
        "optimizer.lr=1e30",
        "train.clip_norm=null",
        "schedule.warmup=0",
        "hydra.run.dir=run",
    )
    line = told(done, code=3)
    assert re.search(r"the loss is (nan|inf) at step \d+", line)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"
    tensors, header = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.safetensors")
    assert header["progress"]["step"] == 0
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_bug_keeps_its_traceback(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import vit.evaluation.accuracy as accuracy\ndef broken(*arguments): raise KeyError('planted')\naccuracy.evaluate = broken\n"
    )
    done = train(
        tmp_path,
        *TINY,
        "train.steps=2",
        "hydra.run.dir=run",
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'planted'" in done.stderr
    assert "planted" in json.loads((tmp_path / "run" / "result.json").read_text())["reason"]


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
