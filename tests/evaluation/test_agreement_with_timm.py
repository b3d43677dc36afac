"""Loss and accuracy are those of timm's validation on the same random weights and the same files.

That is timm's own transform, data set, model and accuracy, put together as its validate.py does.
"""

import json

import pytest
import timm
import torch
from foreign_models import shaken, timm_model
from judged_models import write_classes, write_noise
from safetensors.torch import save_file
from timm.data import ImageDataset, RealLabelsImagenet, create_transform
from timm.models.vision_transformer import checkpoint_filter_fn
from timm.utils import accuracy
from torch import nn

from vit.data.class_folders import imagenet_wnids
from vit.evaluation.measurements import MeasuredModel, in_views, measure_accuracy
from vit.evaluation.restore import restore_pretrained

CPU = torch.device("cpu")
WNIDS = list(imagenet_wnids())
CLASSES = ["cat", "dog", "fox", "owl", "pig"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = {"img_size": 32, "patch_size": 8}


def save(model: nn.Module, path) -> str:
    save_file(model.state_dict(), path)
    return str(path)


def their_outputs(model, root, size, crop_pct, interpolation="bicubic", crop_mode="center"):
    """(logits, labels, file names) of all images, as timm reads and prepares them."""
    transform = create_transform(
        (3, size, size),
        interpolation=interpolation,
        mean=MEAN,
        std=STD,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )
    dataset = ImageDataset(str(root), transform=transform)
    images, labels = zip(*dataset, strict=True)
    with torch.inference_mode():
        logits = model(torch.stack(images))
    return logits, torch.tensor(labels), dataset.filenames(basename=True)


def our_numbers(path, root, *, views="one", size=None, crop=0.875, **data):
    """What evaluate.py pretrained=PATH data=… writes, and the MeasuredModel."""
    group = {
        "name": "folder",
        "root": str(root),
        "mean": list(MEAN),
        "std": list(STD),
        "eval_crop": crop,
        "interpolation": "bicubic",
        **data,
    }
    typed = {"data.mean", "data.std", "data.eval_crop", "data.interpolation"}
    restored = restore_pretrained(
        path, group, {"image_size": size}, CPU, precision="fp32", batch_size=4, typed=typed
    )
    measured = in_views(MeasuredModel(path, restored, "test", workers=0), views)
    return measure_accuracy(measured, frozenset())[0]


def assert_same(numbers, logits, labels):
    loss = nn.functional.cross_entropy(logits, labels).item()
    top1, top5 = accuracy(logits, labels, topk=(1, 5))
    assert numbers["loss"] == pytest.approx(loss, rel=1e-5)
    assert numbers["top1"] == pytest.approx(top1.item() / 100, rel=1e-6)
    assert numbers["top5"] == pytest.approx(top5.item() / 100, rel=1e-6)
    assert numbers["n"] == len(labels)


@pytest.fixture
def model(tmp_path):
    """(timm's model, the file of its weights)."""
    theirs = timm_model(num_classes=5, **SIZES)
    # Far apart, so that the rounding of sums makes no class another
    theirs.head.weight.data *= 20
    save(theirs, tmp_path / "timm.safetensors")
    return theirs, tmp_path / "timm.safetensors"


@pytest.mark.parametrize("crop", [0.875, 0.9, 1.0])
def test_a_folder(tmp_path, model, crop):
    root = write_classes(tmp_path / "images", CLASSES, count=5)
    theirs, path = model
    logits, labels, _ = their_outputs(theirs, root, 32, crop)
    assert_same(our_numbers(path, root, crop=crop), logits, labels)


@pytest.mark.parametrize("size", [48, 64])
def test_another_resolution(tmp_path, model, size):
    root = write_classes(tmp_path / "images", CLASSES, count=5)
    theirs, path = model
    larger = timm.create_model(
        "vit_tiny_patch16_224", img_size=size, patch_size=8, depth=2, num_classes=5
    )
    larger.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), larger))
    logits, labels, _ = their_outputs(larger.eval(), root, size, 1.0)
    assert_same(our_numbers(path, root, size=size, crop=1.0), logits, labels)


def test_mirrored_views(tmp_path, model):
    root = write_classes(tmp_path / "images", CLASSES, count=5)
    theirs, path = model

    class WithMirror(nn.Module):
        def forward(self, images):
            views = torch.stack([theirs(images), theirs(images.flip(3))])
            return views.softmax(2).mean(0).log()

    logits, labels, _ = their_outputs(WithMirror(), root, 32, 0.875)
    assert_same(our_numbers(path, root, views="mirrored"), logits, labels)


@pytest.fixture(scope="module")
def imagenet_model(tmp_path_factory):
    theirs = shaken(
        timm.models.VisionTransformer(
            embed_dim=192, depth=1, num_heads=3, num_classes=1000, **SIZES
        )
    )
    theirs.head.weight.data *= 20
    path = tmp_path_factory.mktemp("imagenet") / "timm.safetensors"
    save(theirs, path)
    return theirs, path


def test_the_classes_of_imagenet_a(tmp_path, imagenet_model):
    theirs, path = imagenet_model
    wnids = sorted(WNIDS[index] for index in (3, 77, 900, 501, 12, 640))
    root = write_classes(tmp_path / "imagenet-a", wnids, count=3)
    numbers = our_numbers(path, root, name="imagenet_a")
    # timm's class map: its labels are places among the sorted folders
    logits, labels, _ = their_outputs(theirs, root, 32, 0.875)
    indices = torch.tensor([WNIDS.index(wnid) for wnid in wnids])
    assert_same(numbers, logits[:, indices], labels)


def test_real_labels(tmp_path, imagenet_model):
    theirs, path = imagenet_model
    root = tmp_path / "imagenet"
    for number in range(1, 13):
        write_noise(root / "val" / "n01440764" / f"ILSVRC2012_val_{number:08}.JPEG", number)
    logits, _, names = their_outputs(theirs, root / "val", 32, 0.875)
    # The best, the third, the ninth or no class of each image is right, and another one
    ranks = logits.argsort(1, descending=True)
    right = [
        [int(ranks[row, rank]), 7] if rank is not None else []
        for row, rank in enumerate([0, 2, 8, None] * 3)
    ]
    (root / "real.json").write_text(json.dumps(right))
    judge = RealLabelsImagenet(names, real_json=root / "real.json")
    judge.add_result(logits)

    numbers = our_numbers(path, root, name="imagenet_real")
    assert numbers["n"] == 9
    assert numbers["loss"] is None
    assert numbers["top1"] == pytest.approx(judge.get_accuracy(1) / 100)
    assert numbers["top5"] == pytest.approx(judge.get_accuracy(5) / 100)
    assert 0 < numbers["top1"] < numbers["top5"] < 1
