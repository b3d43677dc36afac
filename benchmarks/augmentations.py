"""Draws what each augmentation does: one row each, the same ten training images of CIFAR-10, one a class.

PYTHONPATH=. python benchmarks/augmentations.py --root data --out docs/augmentations.png
"""

import argparse
from pathlib import Path

import matplotlib
import torch

matplotlib.use("agg")

from matplotlib import pyplot as plt

from vit.augment.batch import BatchAugmentation
from vit.augment.erasing import random_erase
from vit.augment.mixing import MixupCutmix
from vit.augment.policies import build_policies
from vit.data.datasets import load_data
from vit.data.preprocessing import Preprocessing
from vit.data.splits import sample_evenly

SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data")
    parser.add_argument("--out", type=Path, default=Path("docs/augmentations.png"))
    arguments = parser.parse_args()
    data = load_data(
        name="cifar10",
        root=arguments.root,
        val_fraction=0.0,
        test_fraction=None,
        limit=None,
        image_size=(32, 32),
        num_channels=3,
        num_classes=None,
        num_images=None,
        device=torch.device("cpu"),
    )
    preprocessing = Preprocessing(
        (32, 32), 3, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), None, "bilinear"
    )
    chosen = data.train.subset(sample_evenly(data.train.labels, 10))
    order = chosen.labels.argsort()
    pixels, labels = chosen.pixels, chosen.labels[order]
    assert pixels is not None
    pixels, epochs, indices = pixels[order], torch.zeros(10, dtype=torch.int64), torch.arange(10)
    inputs = preprocessing.to_input(pixels)

    def with_changes(
        pad: float = 0.0,
        crop_scale: list[float] | None = None,
        policy: str = "none",
        jitter: float = 0.0,
    ):
        policies = build_policies(policy, None, None, jitter)
        flip = 0.5 if pad or crop_scale else 0.0
        augmentation = BatchAugmentation(SEED, (32, 32), pad, crop_scale, flip, policies)
        return preprocessing.to_input(augmentation(pixels, epochs, indices))

    rows = {
        "as they are": inputs,
        "pad, crop, flip": with_changes(pad=0.125),
        "resized crop, flip": with_changes(crop_scale=[0.08, 1.0]),
        "randaugment": with_changes(policy="randaugment"),
        "…_big_vision": with_changes(policy="randaugment_big_vision"),
        "…_timm": with_changes(policy="randaugment_timm"),
        "autoaugment": with_changes(policy="autoaugment"),
        "three_augment": with_changes(policy="three_augment"),
        "color_jitter 0.3": with_changes(jitter=0.3),
        "erasing 1.0": random_erase(inputs, epochs, indices, SEED, 1.0),
        "mixup 0.8": MixupCutmix(SEED, 10, 0.8, 0.0, 1.0)(inputs, labels, 0)[0],
        "cutmix 1.0": MixupCutmix(SEED, 10, 0.0, 1.0, 1.0)(inputs, labels, 0)[0],
    }
    figure, axes = plt.subplots(len(rows), 10, figsize=(9.6, 0.8 * len(rows)))
    for (title, images), line in zip(rows.items(), axes, strict=True):
        for image, axis in zip(preprocessing.denormalize(images), line, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_axis_off()
        line[0].text(
            -0.15, 0.5, title, transform=line[0].transAxes, ha="right", va="center", fontsize=9
        )
    figure.subplots_adjust(
        left=0.16, right=0.995, top=0.995, bottom=0.005, wspace=0.05, hspace=0.05
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=100)
    print(f"{arguments.out}: {len(rows)} rows")


if __name__ == "__main__":
    main()
