"""Every experiment takes a step; the ImageNet recipes' learning rates and decay are the published ones."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from helpers import TINY, make_images, rows, run
from hydra import compose, initialize_config_dir

from train import train
from vit.checkpoints.model import build_model
from vit.config.config import from_composed, register, to_dict, validate
from vit.runs.folder import RunFolder
from vit.runtime.signals import StopSignal
from vit.training.optimizers import build_optimizer
from vit.training.plan import build_schedule

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
register()


def composed(experiment, *overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return to_dict(from_composed(compose("train", [f"experiment={experiment}", *overrides])))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_takes_a_step(experiment, tmp_path):
    """One real step with the recipe's model made small and its batch cut; everything else as the recipe has it, but noise in
    place of CIFAR. In this process: each of its own would first spend seconds on importing."""
    plain = composed(experiment, *(["data.root=x"] if "folder" in experiment else []))
    small = [
        "train.steps=1",
        "train.batch_size=6",
        "model.num_layers=2",
        "model.hidden_size=48",
        "model.num_heads=3",
        "runtime.compile=false",
        "runtime.device=cpu",
        "runtime.workers=0",
        "runtime.threads=1",
        "train.precision=fp32",
        "schedule.warmup=0",
        "data.limit=12",
    ]
    if plain["model"]["representation_size"]:
        small.append("model.representation_size=48")
    if plain["schedule"]["cooldown"]:
        small.append("schedule.cooldown=0")
    if plain["data"]["name"].startswith("cifar"):
        small += ["data=synthetic", "data.num_classes=10", "data.num_images=100"]
    elif plain["data"]["name"] != "digits":
        small.append(f"data.root={make_images(tmp_path / 'pictures', {'train': 20, 'val': 6})}")
        small.append("data.val_fraction=0.2")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = from_composed(compose("train", [f"experiment={experiment}", *small]))
    validate(config)
    with RunFolder(tmp_path / "run").outcome() as folder:
        train(config, folder, StopSignal(), [], [])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("finished", 1)
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "run" / "metrics.jsonl"))


@pytest.mark.parametrize(("epochs", "steps"), [(90, 111_477), (300, 371_588)])
def test_big_visions_learning_rate_and_decay(epochs, steps):
    """configs/vit_s16_i1k.py: lr 0.001, a warmup of 10,000 steps, cosine to 0; wd 0.0001 that follows the schedule's factor but
    not the rate itself: what a step takes off a weight is 0.0001 · factor."""
    plain = composed(f"imagenet_vit_s16_{epochs}ep")
    per_epoch = (
        1_281_167 * (1 - plain["data"]["val_fraction"]) / plain["train"]["batch_size"]
    )  # train[:99%]
    total = round(plain["train"]["epochs"] * per_epoch)
    assert total == steps
    schedule = build_schedule(**plain["schedule"], total_steps=total, steps_per_epoch=per_epoch)
    with torch.device("meta"):
        model = build_model(plain["model"], 1000)
    groups = {
        group["name"]: group for group in build_optimizer(model, **plain["optimizer"]).param_groups
    }
    for step in (0, 1, 5_000, 10_000, 11_000, total // 2, total - 1):
        published = min(1.0, step / 10_000) * (
            1.0
            if step < 10_000
            else 0.5 * (1 + math.cos(math.pi * (step - 10_000) / (total - 10_000)))
        )
        rate = groups["decay"]["initial_lr"] * schedule(step)
        assert rate == pytest.approx(0.001 * published, abs=1e-12)
        assert rate * groups["decay"]["weight_decay"] == pytest.approx(
            0.0001 * published, abs=1e-12
        )
    assert groups["no_decay"]["weight_decay"] == 0
    decayed = set(groups["decay"]["params"])
    assert {name for name, parameter in model.named_parameters() if parameter in decayed} == {
        name
        for name, parameter in model.named_parameters()
        if name.endswith("weight") and "norm" not in name
    }
    assert (
        sum(parameter.numel() for parameter in model.parameters())
        == 22_050_664 - 197 * 384 - 384 + 384 * 385
    )


def test_deit3s_learning_rate():
    """README_revenge.md: LAMB 0.003 for 2,048 images, 5 epochs of warmup, cosine to timm's least of 0.00001."""
    plain = composed("imagenet_vit_b16")
    assert plain["data"]["val_fraction"] == 0
    per_epoch = 1_281_167 / 2048
    schedule = build_schedule(
        **plain["schedule"], total_steps=round(800 * per_epoch), steps_per_epoch=per_epoch
    )
    assert plain["train"]["batch_size"] == 2048
    assert 0.003 * schedule(round(2.5 * per_epoch)) == pytest.approx(0.0015, rel=1e-3)
    assert 0.003 * schedule(round(5 * per_epoch)) == pytest.approx(0.003)
    assert 0.003 * schedule(round(800 * per_epoch)) == pytest.approx(1e-5, rel=0.02)
    second = composed("imagenet_vit_b16_phase2")["schedule"]
    finetuning = build_schedule(**second, total_steps=20000, steps_per_epoch=1000)
    assert [finetuning(2500), finetuning(5000), finetuning(20000)] == [0.5, 1.0, 1.0]


def test_recipes_are_run_in_pieces_into_one_table(tmp_path):
    """benchmarks/recipes.py in miniature: stopped by its time, gone on with, then nothing left to do."""

    def piece(minutes):
        return run(
            "benchmarks/recipes.py",
            "digits",
            "--seeds",
            "2",
            "--out",
            str(tmp_path),
            "--minutes",
            str(minutes),
            "--",
            *TINY[1:],
            "train.epochs=2",
            "runtime.threads=1",
            cwd=tmp_path,
        )

    assert piece(0.001).returncode == 75
    done = piece(5)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [
        json.loads((tmp_path / "digits" / f"seed_{seed}" / "result.json").read_text())
        for seed in (0, 1)
    ]
    mean = 50 * (results[0]["test_top1"] + results[1]["test_top1"])
    assert re.search(rf"\| digits \| 2 \| \d+\.\d\d ± \d+\.\d\d \| {mean:.2f} ± ", done.stdout)
    again = piece(5)
    assert again.returncode == 0
    assert "all runs are done" in again.stdout
