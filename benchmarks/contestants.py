"""ViTs of the same sizes by five projects, and a step of each that can be timed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import seconds_of
from vit.model.cost import count_macs
from vit.model.vision_transformer import VisionTransformer
from vit.runtime.precision import Precision
from vit.training.optimizers import build_optimizer

NUM_CLASSES = 1000


class Shape(NamedTuple):
    """The shape of a ViT; image_size and patch_size in pixels."""

    image_size: int
    patch_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_ratio: float = 4.0

    @property
    def intermediate_size(self) -> int:
        return round(self.mlp_ratio * self.hidden_size)


# The names are those of conf/model
SIZES = {
    "vit_nano4": Shape(16, 4, 128, 2, 4),
    "vit_ti4": Shape(32, 4, 192, 12, 3),
    "vit_mini4": Shape(32, 4, 256, 5, 8, 2.0),
    "vit_s4": Shape(32, 4, 384, 12, 6),
    "vit_s16": Shape(224, 16, 384, 12, 6),
    "vit_b16": Shape(224, 16, 768, 12, 12),
    "vit_l16": Shape(224, 16, 1024, 24, 16),
}


def build_ours(shape: Shape) -> VisionTransformer:
    return VisionTransformer(**shape._asdict(), num_classes=NUM_CLASSES)


# The other libraries are imported late, so that those that are not compared need not be installed


def build_timm(shape: Shape) -> nn.Module:
    from timm.models import VisionTransformer as TimmVisionTransformer

    return TimmVisionTransformer(
        img_size=shape.image_size,
        patch_size=shape.patch_size,
        embed_dim=shape.hidden_size,
        depth=shape.num_layers,
        num_heads=shape.num_heads,
        mlp_ratio=shape.mlp_ratio,
        num_classes=NUM_CLASSES,
    )


def build_huggingface(shape: Shape) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    # num_labels is a setting of every model's configuration, which the library's types leave out
    config = ViTConfig(
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        num_labels=NUM_CLASSES,  # pyright: ignore[reportCallIssue]
    )
    return ViTForImageClassification(config)


def build_torchvision(shape: Shape) -> nn.Module:
    from torchvision.models import VisionTransformer as TorchvisionVisionTransformer

    return TorchvisionVisionTransformer(
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        hidden_dim=shape.hidden_size,
        mlp_dim=shape.intermediate_size,
        num_classes=NUM_CLASSES,
    )


def build_vit_pytorch(shape: Shape) -> nn.Module:
    from vit_pytorch import ViT

    return ViT(
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        num_classes=NUM_CLASSES,
        dim=shape.hidden_size,
        depth=shape.num_layers,
        heads=shape.num_heads,
        mlp_dim=shape.intermediate_size,
        dim_head=shape.hidden_size // shape.num_heads,
    )


PROJECTS: dict[str, Callable[[Shape], nn.Module]] = {
    "ours": build_ours,
    "timm": build_timm,
    "huggingface": build_huggingface,
    "torchvision": build_torchvision,
    "vit_pytorch": build_vit_pytorch,
}
OTHERS = [name for name in PROJECTS if name != "ours"]


@dataclass(frozen=True)
class Contestant:
    """A project's ViT; project: a key of PROJECTS. compiled: by torch.compile, as a whole."""

    project: str
    compiled: bool

    def __str__(self) -> str:
        return f"{self.project} compiled" if self.compiled else self.project


@dataclass(frozen=True)
class TimedStep:
    """A step on a batch of noise; each call makes one and returns its seconds.

    model: compiled or not; optimizer: None for a step of inference, else the step is one of
    training, with forward and backward pass and update.
    """

    model: Callable[[Tensor], Any]
    optimizer: torch.optim.Optimizer | None
    images: Tensor
    labels: Tensor
    precision: Precision

    def __call__(self) -> float:
        return seconds_of(self.run, self.precision.device)

    def run(self) -> None:
        if self.optimizer is None:
            with torch.inference_mode():
                self.logits()
            return
        F.cross_entropy(self.logits(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def logits(self) -> Tensor:
        with self.precision.autocast():
            output = self.model(self.images)
        # Hugging Face's models return them in an object
        return getattr(output, "logits", output).float()


def make_step(
    contestant: Contestant, size: str, batch_size: int, precision: Precision, training: bool
) -> TimedStep:
    """Build a contestant's model of a size in SIZES, and its step.

    The optimizer is AdamW: for ours as build_optimizer makes it, for the others as torch does by
    default, which is what their own examples use.
    """
    device = precision.device
    shape = SIZES[size]
    torch.manual_seed(0)
    model = PROJECTS[contestant.project](shape).to(device).train(training)
    images = torch.randn(batch_size, 3, shape.image_size, shape.image_size, device=device)
    labels = torch.randint(0, NUM_CLASSES, (batch_size,), device=device)

    optimizer = None
    if training and contestant.project == "ours":
        optimizer = build_optimizer(model, name="adamw", lr=1e-4, weight_decay=0.05)
    elif training:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    forward = torch.compile(model) if contestant.compiled else model
    return TimedStep(forward, optimizer, images, labels, precision)


def ours_on_meta(size: str) -> VisionTransformer:
    """Return our model without memory or weights, to count what is in it."""
    with torch.device("meta"):
        return build_ours(SIZES[size])


def flops_per_image(size: str, training: bool) -> int:
    """Return the FLOPs of one image's step: two a multiply-add, thrice that with the backward."""
    return (6 if training else 2) * count_macs(ours_on_meta(size))
