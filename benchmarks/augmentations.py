"""Draw what each augmentation does to ten training images of CIFAR-10, one a class.

python benchmarks/augmentations.py --root data --out docs/augmentations.png
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

# Before pyplot is imported, which would look for a screen
matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

# The script is started by its path, and the repository is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from vit.augment.affine import Affine
from vit.augment.batch import BatchAugmentation
from vit.augment.erasing import random_erase
from vit.augment.mixing import MixupCutmix
from vit.augment.policies import build_policies
from vit.data.datasets import load_data
from vit.data.preprocessing import Preprocessing
from vit.data.splits import ImageSplit, sample_evenly

SEED = 0
NUM_CLASSES = 10
IMAGE_SIZE = (32, 32)
PREPROCESSING = Preprocessing(
    image_size=IMAGE_SIZE,
    num_channels=3,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    eval_crop=None,
    interpolation="bilinear",
)
POLICIES = {
    "randaugment": "randaugment",
    "…_big_vision": "randaugment_big_vision",
    "…_timm": "randaugment_timm",
    "autoaugment": "autoaugment",
    "three_augment": "three_augment",
}


def load_images(root: str) -> ImageSplit:
    """Return one training image of each class, in the order of the classes."""
    data = load_data(
        name="cifar10",
        root=root,
        val_fraction=0.0,
        test_fraction=None,
        limit=None,
        image_size=IMAGE_SIZE,
        num_channels=3,
        settings={},
        device=torch.device("cpu"),
    )
    images = data.train.subset(sample_evenly(data.train.labels, NUM_CLASSES))
    return images.subset(images.labels.argsort())


def augment(
    pixels: Tensor,
    pad: float = 0.0,
    crop_scale: list[float] | None = None,
    policy: str = "none",
    color_jitter: float = 0.0,
    affine: Affine | None = None,
) -> Tensor:
    """Augment uint8 images (B, C, height, width) as a batch, and normalize them.

    Only crops come with mirroring, so that a policy's own effect is seen.
    """
    flip = 0.5 if pad or crop_scale else 0.0
    policies = build_policies(policy, None, None, color_jitter)
    augmentation = BatchAugmentation(SEED, IMAGE_SIZE, pad, crop_scale, flip, policies, affine)
    epochs, indices = sample_ids(len(pixels))
    return PREPROCESSING.to_input(augmentation(pixels, epochs, indices))


def sample_ids(count: int) -> tuple[Tensor, Tensor]:
    """Return (epochs, indices) for `count` images, from which their random numbers are drawn."""
    return torch.zeros(count, dtype=torch.int64), torch.arange(count)


def make_rows(images: ImageSplit) -> dict[str, Tensor]:
    """Return normalized images (B, C, height, width) of each augmentation, by the row's title."""
    pixels, labels = images.pixels, images.labels
    assert pixels is not None
    inputs = PREPROCESSING.to_input(pixels)
    epochs, indices = sample_ids(len(pixels))

    rows = {
        "as they are": inputs,
        "pad, crop, flip": augment(pixels, pad=0.125),
        "resized crop, flip": augment(pixels, crop_scale=[0.08, 1.0]),
        "affine": augment(pixels, affine=Affine(rotate=10, translate=0.06, scale=0.1, shear=6)),
    }
    for title, policy in POLICIES.items():
        rows[title] = augment(pixels, policy=policy)
    rows["color_jitter 0.3"] = augment(pixels, color_jitter=0.3)
    rows["erasing 1.0"] = random_erase(inputs, epochs, indices, SEED, probability=1.0)

    mixup = MixupCutmix(SEED, NUM_CLASSES, mixup=0.8, cutmix=0.0, probability=1.0)
    cutmix = MixupCutmix(SEED, NUM_CLASSES, mixup=0.0, cutmix=1.0, probability=1.0)
    rows["mixup 0.8"], _ = mixup(inputs, labels, step=0)
    rows["cutmix 1.0"], _ = cutmix(inputs, labels, step=0)
    return rows


def draw(rows: dict[str, Tensor]) -> Figure:
    """Draw a row of images for each augmentation, its title on the left."""
    figure, axes = plt.subplots(len(rows), NUM_CLASSES, figsize=(9.6, 0.8 * len(rows)))
    for (title, inputs), row_axes in zip(rows.items(), axes, strict=True):
        images = PREPROCESSING.denormalize(inputs)
        for image, axis in zip(images, row_axes, strict=True):
            # Every pixel as it is: the images are small
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_axis_off()
        first = row_axes[0]
        position = {"transform": first.transAxes, "ha": "right", "va": "center"}
        first.text(-0.15, 0.5, title, fontsize=9, **position)
    figure.subplots_adjust(
        left=0.16, right=0.995, top=0.995, bottom=0.005, wspace=0.05, hspace=0.05
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data")
    parser.add_argument("--out", type=Path, default=Path("docs/augmentations.png"))
    arguments = parser.parse_args()

    rows = make_rows(load_images(arguments.root))
    figure = draw(rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=100)
    print(f"{arguments.out}: {len(rows)} rows")


if __name__ == "__main__":
    main()
