"""ViTs of one size by five projects, and one step of each to be timed in turn: what speed.py and gpu.py have in common."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit.model.vision_transformer import VisionTransformer
from vit.runtime.precision import Precision
from vit.training.optimizers import build_optimizer

SIZES = {  # image, patch, width, layers, heads: names as in conf/model
    "vit_nano4": (16, 4, 128, 2, 4),
    "vit_ti4": (32, 4, 192, 12, 3),
    "vit_s4": (32, 4, 384, 12, 6),
    "vit_s16": (224, 16, 384, 12, 6),
    "vit_b16": (224, 16, 768, 12, 12),
    "vit_l16": (224, 16, 1024, 24, 16),
}
CLASSES = 1000


def ours(image: int, patch: int, width: int, layers: int, heads: int) -> nn.Module:
    return VisionTransformer(
        image_size=image,
        patch_size=patch,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_classes=CLASSES,
    )


def timm(image: int, patch: int, width: int, layers: int, heads: int) -> nn.Module:
    from timm.models import VisionTransformer as Timm

    return Timm(
        img_size=image,
        patch_size=patch,
        embed_dim=width,
        depth=layers,
        num_heads=heads,
        num_classes=CLASSES,
    )


def huggingface(image: int, patch: int, width: int, layers: int, heads: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=image,
            patch_size=patch,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            num_labels=CLASSES,
        )
    )


def torchvision(image: int, patch: int, width: int, layers: int, heads: int) -> nn.Module:
    from torchvision.models import VisionTransformer as Torchvision

    return Torchvision(image, patch, layers, heads, width, 4 * width, num_classes=CLASSES)


def vit_pytorch(image: int, patch: int, width: int, layers: int, heads: int) -> nn.Module:
    from vit_pytorch import ViT

    return ViT(
        image_size=image,
        patch_size=patch,
        num_classes=CLASSES,
        dim=width,
        depth=layers,
        heads=heads,
        mlp_dim=4 * width,
        dim_head=width // heads,
    )


OTHERS = {build.__name__: build for build in (timm, huggingface, torchvision, vit_pytorch)}


@dataclass(frozen=True)
class Contestant:
    name: str
    compiled: bool

    def __str__(self) -> str:
        return f"{self.name} compiled" if self.compiled else self.name

    def build(self, size: str, device: torch.device) -> nn.Module:
        return {"ours": ours, **OTHERS}[self.name](*SIZES[size]).to(device)


def make_step(
    contestant: Contestant, size: str, batch: int, precision: Precision, training: bool
) -> Callable[[], float]:
    """A function that makes one step on images of noise and returns its seconds. Training: forward, backward, AdamW, as
    build_optimizer makes it for ours and as torch does by default for the others, as their own examples have it."""
    device = precision.device
    torch.manual_seed(0)
    model = contestant.build(size, device).train(training)
    images = torch.randn(batch, 3, SIZES[size][0], SIZES[size][0], device=device)
    labels = torch.randint(0, CLASSES, (batch,), device=device)
    forward = torch.compile(model) if contestant.compiled else model
    optimizer = None
    if training:
        optimizer = (
            build_optimizer(model, name="adamw", lr=1e-4, weight_decay=0.05)
            if contestant.name == "ours"
            else torch.optim.AdamW(model.parameters(), lr=1e-4)
        )

    def logits() -> Tensor:
        with precision.autocast():
            out = forward(images)
        return getattr(out, "logits", out).float()  # Hugging Face wraps them

    def step() -> float:
        finish(device)
        began = time.perf_counter()
        if optimizer is None:
            with torch.inference_mode():
                logits()
        else:
            F.cross_entropy(logits(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        finish(device)
        return time.perf_counter() - began

    return step


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def take_turns(
    steps: Mapping[Contestant, Callable[[], float]], rounds: int
) -> dict[Contestant, list[float]]:
    """Seconds of each contestant's step in each round, all of them one after another in every round, so that a machine that
    slows down slows them all."""
    times: dict[Contestant, list[float]] = {contestant: [] for contestant in steps}
    for _ in range(rounds):
        for contestant, step in steps.items():
            times[contestant].append(step())
    return times


def ratio(slower: list[float], faster: list[float]) -> float:
    """How much faster the second is: the median over the rounds of their quotients."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))
