"""Every experiment takes a step; the learning rates and decay are the published ones."""

import math
from dataclasses import asdict

import pytest
import torch
from composing import configured, files_of
from helpers import ROOT, make_images, read_result, rows, train
from torch import nn

from vit.checkpoints.model import build_model
from vit.config.config import Config
from vit.model.vision_transformer import VisionTransformer
from vit.training.plan import build_schedule
from vit.training.prepare import build_optimizer_of, macs_of

EXPERIMENTS = files_of("experiment")
IMAGENET_IMAGES = 1_281_167
SMALL = [
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
    "pretrained=null",
]


def recipe(experiment: str) -> Config:
    overrides = ["data.root=x"] if "folder" in experiment else []
    return configured(f"experiment={experiment}", *overrides)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_takes_a_step(experiment, tmp_path):
    """A real step of the recipe with a small model and batch, on noise in place of CIFAR."""
    config = recipe(experiment)
    small = [*SMALL]
    if config.model.representation_size:
        small.append("model.representation_size=48")
    if config.schedule.cooldown:
        small.append("schedule.cooldown=0")
    if config.data.name.startswith("cifar"):
        small += ["data=synthetic", "data.num_classes=10", "data.num_images=100"]
    elif config.data.name != "digits":
        root = make_images(tmp_path / "images", {"train": 20, "val": 6})
        small.append(f"data.root={root}")
        # A folder's own val is its validation split; ImageNet's is used as test
        if config.data.name != "folder":
            small.append("data.val_fraction=0.2")
    done = train(tmp_path, f"experiment={experiment}", *small, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path / "run")
    assert (result["status"], result["steps"]) == ("finished", 1)
    losses = [row["loss"] for row in rows(tmp_path / "run" / "metrics.jsonl")]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(("epochs", "steps"), [(90, 111_477), (300, 371_588)])
def test_learning_rate_and_decay_of_big_vision(epochs, steps):
    """configs/vit_s16_i1k.py: 0.001, a warmup of 10,000 steps, cosine to 0; weight decay 0.0001.

    The decay follows the schedule's factor but not the rate itself: a step takes 0.0001 times the
    factor off a weight.
    """
    config = recipe(f"imagenet_vit_s16_{epochs}ep")
    train_images = IMAGENET_IMAGES * (1 - config.data.val_fraction)  # train[:99%]
    steps_per_epoch = train_images / config.train.batch_size
    total = round(config.train.epochs * steps_per_epoch)
    assert total == steps
    schedule = build_schedule(
        **asdict(config.schedule), total_steps=total, steps_per_epoch=steps_per_epoch
    )
    with torch.device("meta"):
        model = build_model(asdict(config.model), 1000)
    groups = {group["name"]: group for group in build_optimizer_of(config, model).param_groups}
    for step in (0, 1, 5_000, 10_000, 11_000, total // 2, total - 1):
        rate = groups["decay"]["initial_lr"] * schedule(step)
        factor = published_factor(step, total)
        assert rate == pytest.approx(0.001 * factor, abs=1e-12)
        decay = rate * groups["decay"]["weight_decay"]
        assert decay == pytest.approx(0.0001 * factor, abs=1e-12)

    # Only matrices and kernels are decayed
    assert groups["no_decay"]["weight_decay"] == 0
    decayed = set(groups["decay"]["params"])
    names = {name for name, parameter in model.named_parameters() if parameter in decayed}
    assert names == {
        name
        for name, _ in model.named_parameters()
        if name.endswith("weight") and "norm" not in name
    }
    # As published, but for fixed positions and a head without its hidden layer
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == 22_050_664 - 197 * 384 - 384 + 384 * 385


def test_the_arithmetic_of_the_recipe_for_two_minutes():
    """What the header of cifar10_fast_gpu says of the work, and of the rate that it needs."""
    config = recipe("cifar10_fast_gpu")
    header = (ROOT / "conf" / "experiment" / "cifar10_fast_gpu.yaml").read_text()
    images = 50_000 * config.train.epochs
    flops = 6 * macs_of(config, 10)
    steps, seconds = round(images / config.train.batch_size), 95
    rate = flops * images / seconds
    for part in (
        f"{flops / 6e6:.1f} M multiply-adds",
        f"{flops / 1e9:.3f} GFLOP",
        f"{flops * images / 1e15:.2f} PFLOP",
        f"{steps:,} steps of {config.train.batch_size:,} images",
        f"{round(images / seconds, -3):,.0f} images/s",
        f"{1000 * seconds / steps:.0f} ms a step",
        f"{rate / 1e12:.0f} TFLOP/s",
        f"{rate / 989e12:.0%}".replace("%", " %"),
        "Not measured",
    ):
        assert part in header


def published_factor(step: int, total: int) -> float:
    """big_vision's schedule as a factor of its base learning rate."""
    if step < 10_000:
        return step / 10_000
    return 0.5 * (1 + math.cos(math.pi * (step - 10_000) / (total - 10_000)))


def test_learning_rate_of_deit_3():
    """README_revenge.md: LAMB 0.003 for 2,048 images, 5 epochs of warmup, cosine to 0.00001."""
    config = recipe("imagenet_vit_b16")
    assert config.data.val_fraction == 0
    assert config.train.batch_size == 2048
    steps_per_epoch = IMAGENET_IMAGES / 2048
    schedule = build_schedule(
        **asdict(config.schedule),
        total_steps=round(800 * steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
    )
    assert 0.003 * schedule(round(2.5 * steps_per_epoch)) == pytest.approx(0.0015, rel=1e-3)
    assert 0.003 * schedule(round(5 * steps_per_epoch)) == pytest.approx(0.003)
    assert 0.003 * schedule(round(800 * steps_per_epoch)) == pytest.approx(1e-5, rel=0.02)


def test_the_second_phase_of_deit_3_has_a_constant_rate():
    settings = asdict(recipe("imagenet_vit_b16_phase2").schedule)
    schedule = build_schedule(**settings, total_steps=20000, steps_per_epoch=1000)
    assert [schedule(2500), schedule(5000), schedule(20000)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_fine_tuning_at_224_px_drops_where_the_port_does(data):
    """ViT-pytorch's models/modeling.py: after the embeddings and in the MLPs, not in attention."""
    model = on_meta(recipe(f"finetune_{data}_vit_b16"))
    assert model.embeddings.dropout.p == 0.1
    assert {block.mlp.dropout.p for block in model.encoder.blocks} == {0.1}
    assert {block.attention.dropout.p for block in model.encoder.blocks} == {0.0}
    assert {block.attention.attention_dropout for block in model.encoder.blocks} == {0.0}


@pytest.mark.parametrize(("data", "lr"), [("cifar10", 0.01), ("cifar100", 0.03)])
def test_fine_tuning_at_384_px_is_that_of_vit_jax(data, lr):
    """configs/vit.py has its own learning rate for CIFAR-10; checkpoint.py zooms with order 1."""
    config = recipe(f"finetune_{data}_vit_b16_384")
    assert config.optimizer.lr == lr
    assert config.pretrained_positions == "linear"
    model = on_meta(config)
    assert {part.p for part in model.modules() if isinstance(part, nn.Dropout)} == {0.0}


def on_meta(config: Config) -> VisionTransformer:
    with torch.device("meta"):
        return build_model(asdict(config.model), 10)
