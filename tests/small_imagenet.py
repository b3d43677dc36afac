"""What ImageNet's development kit holds, for three classes and four images of val."""

import numpy as np
import torch
from scipy.io import savemat

from vit.data.datasets import load_data
from vit.data.splits import ImageDataset

WNIDS = ["n01440764", "n01443537", "n01484850"]
# Ids of the development kit are in another order than the wnids, and there are parents above 1000
SYNSETS = [(1, "n01484850", 0), (2, "n01440764", 0), (3, "n01443537", 0), (1001, "n00001740", 3)]
IDS = [3, 1, 1, 2]  # of the images 1 to 4
EXPECTED = [1, 2, 2, 0]  # positions among WNIDS


def image_name(number):
    return f"ILSVRC2012_val_{number:08}"


def write_meta(path):
    """A meta.mat with the fields of the development kit."""
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children")
    synsets = np.empty((len(SYNSETS), 1), dtype=[(name, object) for name in names])
    for row, (number, wnid, children) in enumerate(SYNSETS):
        synsets[row, 0] = (
            number,
            wnid,
            f"{wnid}, a name",
            "a gloss",
            children,
            np.arange(children),
        )
    savemat(path, {"synsets": synsets})


def write_devkit(root):
    folder = root / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    write_meta(folder / "meta.mat")
    text = "".join(f"{number}\n" for number in IDS)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(text)


def load_imagenet(root, val_fraction) -> ImageDataset:
    """data=imagenet of a folder."""
    return load_data(
        name="imagenet",
        root=str(root),
        val_fraction=val_fraction,
        test_fraction=None,
        limit=None,
        image_size=(16, 16),
        num_channels=3,
        settings={},
        device=torch.device("cpu"),
    )
