import os
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_images
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

from vit.augment.batch import BatchAugmentation
from vit.augment.erasing import random_erase
from vit.data.training_transform import TrainingTransform
from vit.augment.mixing import MixupCutmix
from vit.augment.policies import build_policies
from vit.data.datasets import is_imagenet, load_data, readable_names
from vit.data.loader import evaluation_batches
from vit.data.preprocessing import Preprocessing
from vit.data.sample_order import SampleOrder
from vit.data.splits import ImageSplit, hold_out, sample_evenly
from vit.errors import DataError
from vit.training.batches import Augmentation, training_batches

CPU = torch.device("cpu")
SETTINGS = {
    "root": None,
    "val_fraction": 0.1,
    "test_fraction": None,
    "limit": None,
    "image_size": (16, 16),
    "num_channels": 3,
    "num_classes": None,
    "num_images": None,
    "device": CPU,
}


def load(name, **changes):
    return load_data(name=name, **{**SETTINGS, **changes})


def test_digits_are_scikit_learns_and_split_by_class():
    data = load("digits", val_fraction=0.2, test_fraction=0.2)
    assert [len(data.train), len(data.val), len(data.test)] == [1151, 287, 359]
    images, labels = load_digits(return_X_y=True)
    pixels = torch.cat([part.pixels for part in (data.train, data.val, data.test)]).reshape(-1, 64)
    found = torch.cat([part.labels for part in (data.train, data.val, data.test)])
    ours = {
        (tuple((row / 255 * 16).round().int().tolist()), int(label))
        for row, label in zip(pixels, found, strict=True)
    }
    assert ours == {
        (tuple(row.astype(int).tolist()), int(label))
        for row, label in zip(images, labels, strict=True)
    }
    for part in (data.val, data.test):
        counts = torch.bincount(part.labels)
        assert counts.max() - counts.min() <= 2


def test_hold_out_takes_its_share_of_every_class_and_no_image_twice():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 2 + [3])
    everything = ImageSplit(
        "all", labels, pixels=torch.arange(153, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    )
    rest, held = hold_out(everything, 0.1, "held")
    assert torch.bincount(held.labels, minlength=4).tolist() == [10, 5, 1, 0]
    assert torch.cat([rest.pixels, held.pixels]).flatten().sort().values.tolist() == list(
        range(153)
    )
    again = hold_out(everything, 0.1, "held")[1]
    assert torch.equal(held.pixels, again.pixels)
    more = hold_out(everything, 0.2, "held")[1]
    assert set(held.pixels.flatten().tolist()) < set(more.pixels.flatten().tolist())


def test_limit_is_spread_over_the_classes():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 2)
    chosen = sample_evenly(labels, 11)
    assert torch.bincount(labels[chosen]).tolist() == [5, 4, 2]
    assert torch.equal(chosen, chosen.sort().values)
    assert len(sample_evenly(labels, 1000)) == 152
    parts = vars(load("digits", test_fraction=0.2, limit=30)).values()
    assert [len(part) for part in parts if isinstance(part, ImageSplit)] == [30] * 3


def write_cifar(root, monkeypatch, per_batch=20):
    """The official layout, with fewer images; torchvision's MD5 check of the official files is set aside."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data = generator.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        with open(folder / name, "wb") as file:
            pickle.dump(
                {"data": data, "labels": [(i + number) % 10 for i in range(per_batch)]}, file
            )
    with open(folder / "batches.meta", "wb") as file:
        pickle.dump({"label_names": [f"class {i}" for i in range(10)]}, file)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)


def test_cifar_files_are_read_and_val_is_held_out_of_train(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    data = load("cifar10", root=str(tmp_path))
    assert data.classes == [f"class {i}" for i in range(10)]
    assert [len(data.train), len(data.val), len(data.test)] == [90, 10, 20]
    assert data.train.pixels.shape == (90, 3, 32, 32)
    assert data.train.pixels.dtype == torch.uint8
    with open(tmp_path / "cifar-10-batches-py" / "test_batch", "rb") as file:
        first = pickle.load(file)["data"][0]
    assert np.array_equal(data.test.pixels[0].flatten().numpy(), first)
    assert "CIFAR-10 test, 20 images" in str(data.test)
    assert load("cifar10", root=str(tmp_path), val_fraction=0.0).val is None


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch, name):
    def no_network(*arguments, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(DataError, match=rf"{tmp_path}/cifar-.*no network.*experiment=digits"):
        load(name, root=str(tmp_path))


def test_folder_with_all_splits_and_folder_with_train_alone(tmp_path):
    whole = load(
        "folder",
        root=str(make_images(tmp_path / "whole", {"train": 6, "val": 3, "test": 2})),
        test_fraction=0.1,
    )
    assert [len(whole.train), len(whole.val), len(whole.test)] == [12, 6, 4]
    assert whole.classes == ["cat", "dog"]
    alone = load(
        "folder", root=str(make_images(tmp_path / "alone", {"train": 10})), test_fraction=0.2
    )
    assert [len(alone.train), len(alone.val), len(alone.test)] == [14, 2, 4]
    assert torch.bincount(alone.test.labels).tolist() == [2, 2]
    paths = [set(part.paths.tolist()) for part in (alone.train, alone.val, alone.test)]
    assert len(set.union(*paths)) == 20


def test_imagenet_layout_uses_val_as_test_and_says_so(tmp_path):
    data = load(
        "imagenet",
        root=str(make_images(tmp_path, {"train": 10, "val": 3}, ("n01440764", "n01443537"))),
    )
    assert [len(data.train), len(data.val), len(data.test)] == [18, 2, 6]
    assert "used as test" in data.test.title
    assert data.classes == ["n01440764", "n01443537"]


def test_tiny_imagenets_own_layout(tmp_path):
    for wnid in ("n1", "n2"):
        make_images(tmp_path / "train" / wnid, {".": 4}, ("images",))
    make_images(tmp_path, {"val": 4}, ("images",))
    lines = [f"{i}.jpg\tn{1 + i % 2}\t0\t0\t62\t62" for i in range(4)]
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    data = load("tiny_imagenet", root=str(tmp_path))
    assert data.classes == ["n1", "n2"]
    assert data.test.labels.tolist() == [0, 1, 0, 1]
    assert os.fsdecode(data.test.paths[1]) == str(tmp_path / "val" / "images" / "1.jpg")


def test_imagenets_thousand_folders_get_readable_names():
    from timm.data import ImageNetInfo

    wnids = sorted(ImageNetInfo("imagenet-1k").label_names())
    assert is_imagenet(wnids)
    names = readable_names(wnids)
    assert (names[0], names[1], names[999]) == ("tench", "goldfish", "toilet tissue")
    assert not is_imagenet([*wnids[:-1], "n99999999"])


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            lambda root: (root / "train").rename(root / "training"),
            "no folder .*train; put pictures",
        ),
        (
            lambda root: [file.unlink() for file in (root / "train" / "dog").iterdir()],
            "train/dog: no pictures",
        ),
        (
            lambda root: (root / "val" / "dog").rename(root / "val" / "wolf"),
            "val: its classes .* lacks dog and has besides wolf",
        ),
        (lambda root: (root / "train" / "dog").rename(root / "dog"), "found 1 class folders"),
    ],
)
def test_folders_that_are_wrong_are_refused(tmp_path, spoil, told):
    root = make_images(tmp_path, {"train": 3, "val": 2})
    spoil(root)
    with pytest.raises(DataError, match=told):
        load("folder", root=str(root), test_fraction=0.2)


def test_every_epoch_sees_every_sample_once_whatever_the_batch():
    for batch_size in (7, 10, 32, 100):
        order = SampleOrder(100, batch_size, seed=1)
        epochs, indices = (
            torch.cat(parts)
            for parts in zip(*(order.batch(step) for step in range(300 // batch_size)), strict=True)
        )
        first = indices[epochs == 0]
        assert torch.equal(first.sort().values, torch.arange(100))
        assert torch.equal(
            indices,
            torch.cat([SampleOrder(100, 1, 1).epoch_order(e) for e in range(3)])[: len(indices)],
        )
        assert not torch.equal(first, indices[epochs == 1][:100])
    late = SampleOrder(100, 7, seed=1)
    assert torch.equal(late.batch(40)[1], indices_at(40, 7))
    assert not torch.equal(late.batch(40)[1], SampleOrder(100, 7, seed=2).batch(40)[1])


def test_repeated_samples_come_in_a_row_but_apart_in_the_batch():
    order = SampleOrder(100, 32, seed=1, repeats=3)
    batches = [order.batch(step) for step in range(30)]
    passes, indices = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert (
        len(set(zip(passes.tolist(), indices.tolist(), strict=True))) == 960
    )  # no picture of the run comes twice
    for step, (_, drawn) in enumerate(batches):
        assert len(drawn.unique()) <= 32 / 3 + 2
        assert all(
            a != b for a, b in zip(drawn[::2].tolist(), drawn[1::2].tolist(), strict=True)
        ), step
    plain = torch.cat([SampleOrder(100, 1, 1).epoch_order(e) for e in range(4)])
    assert set(indices[:96].tolist()) == set(plain[:32].tolist())


def indices_at(step, batch_size):
    stream = torch.cat([SampleOrder(100, 1, 1).epoch_order(e) for e in range(4)])
    return stream[step * batch_size : (step + 1) * batch_size]


NO_BATCH_CHANGE = BatchAugmentation(5, (24, 24), 0.0, None, 0.0)


def folder_batches(data, workers, first=0, last=4):
    preprocessing = Preprocessing((24, 24), 3, (0.5,), (0.25,), 0.875, "bilinear")
    transform = TrainingTransform(
        preprocessing, [0.2, 1.0], 0.5, build_policies("randaugment", 2, 9, 0.3)
    )
    augmentation = Augmentation(transform, NO_BATCH_CHANGE, 0.5, MixupCutmix(5, 2, 0.8, 1.0, 0.9))
    return list(
        training_batches(
            data.train,
            SampleOrder(len(data.train), 8, 5),
            first,
            last,
            preprocessing,
            augmentation,
            workers,
            CPU,
        )
    )


def test_any_number_of_workers_gives_the_same_batches(tmp_path):
    data = load("folder", root=str(make_images(tmp_path, {"train": 12})), test_fraction=0.1)
    expected = folder_batches(data, 0)
    for workers in (1, 2):
        for (images, labels), (other_images, other_labels) in zip(
            folder_batches(data, workers), expected, strict=True
        ):
            assert torch.equal(images, other_images)
            assert torch.equal(labels, other_labels)
    resumed = folder_batches(data, 1, first=2)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(resumed, expected[2:], strict=True))
    assert expected[0][0].shape == (8, 3, 24, 24)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_picture_is_named(tmp_path, workers):
    data = load("folder", root=str(make_images(tmp_path, {"train": 12})), test_fraction=0.1)
    (tmp_path / "train" / "cat" / "3.jpg").write_bytes(b"\xff\xd8 no more")
    with pytest.raises(DataError, match=r"train/cat/3\.jpg: not a readable picture"):
        folder_batches(data, workers, last=6)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_picture_can_be_replaced_by_another(tmp_path, workers):
    data = load("folder", root=str(make_images(tmp_path, {"train": 12})), test_fraction=0.1)
    preprocessing = Preprocessing((24, 24), 3, (0.5,), (0.25,), 0.875, "bilinear")
    augmentation = Augmentation(
        TrainingTransform(preprocessing, None, 0.0),
        NO_BATCH_CHANGE,
        0.0,
        MixupCutmix(0, 2, 0.0, 0.0, 1.0),
        skip=True,
    )
    paths = [os.fsdecode(path) for path in data.train.paths]

    def epoch():
        batches = training_batches(
            data.train,
            SampleOrder(len(data.train), len(data.train), 5),
            0,
            1,
            preprocessing,
            augmentation,
            workers,
            CPU,
        )
        return next(batches), SampleOrder(len(data.train), len(data.train), 5).batch(0)[1].tolist()

    (whole, _), order = epoch()
    bad = order[3]
    Path(paths[bad]).write_bytes(b"\xff\xd8 no more")
    (images, labels), _ = epoch()
    substitute = (bad + 1) % len(data.train)
    assert torch.equal(images[3], whole[order.index(substitute)])
    assert labels[3] == data.train.labels[substitute]
    assert all(
        torch.equal(images[place], whole[place]) for place in range(len(order)) if place != 3
    )
    Path(paths[order[7]]).write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of \d+ pictures can't be read, more than 1%"):
        epoch()


def test_the_fingerprint_tells_data_sets_apart_but_not_where_they_lie(tmp_path):
    data = load("folder", root=str(make_images(tmp_path / "a", {"train": 12})), test_fraction=0.1)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = load("folder", root=str(tmp_path / "b"), test_fraction=0.1)
    assert moved.train.fingerprint() == data.train.fingerprint()
    assert moved.test.fingerprint() != data.train.fingerprint()
    digits = load("digits", test_fraction=0.2).train
    assert digits.fingerprint() == load("digits", test_fraction=0.2).train.fingerprint()
    assert ImageSplit("x", digits.labels, digits.pixels ^ 1).fingerprint() != digits.fingerprint()
    assert (
        ImageSplit("x", digits.labels.flip(0), digits.pixels).fingerprint() != digits.fingerprint()
    )


def test_evaluation_sees_every_picture_once_in_order(tmp_path):
    data = load(
        "folder", root=str(make_images(tmp_path, {"train": 5, "test": 5})), test_fraction=0.1
    )
    preprocessing = Preprocessing((24, 24), 3, (0.5,), (0.25,), 0.875, "bilinear")
    batches = list(evaluation_batches(data.test, 4, preprocessing, 1, CPU))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.test.labels)
    images = torch.cat([images for images, _ in batches])
    expected = preprocessing(Image.open(os.fsdecode(data.test.paths[7])))
    torch.testing.assert_close(images[7], expected)


def test_small_images_are_batched_on_the_device_and_resized():
    data = load("digits", test_fraction=0.2)
    preprocessing = Preprocessing((16, 16), 1, (0.3,), (0.4,), None, "bilinear")
    order = SampleOrder(len(data.train), 32, 0)
    plain = Augmentation(
        TrainingTransform(preprocessing, None, 0.0),
        NO_BATCH_CHANGE,
        0.0,
        MixupCutmix(0, 10, 0.0, 0.0, 1.0),
    )
    images, labels = next(training_batches(data.train, order, 3, 4, preprocessing, plain, 0, CPU))
    indices = order.batch(3)[1]
    assert torch.equal(labels, data.train.labels[indices])
    torch.testing.assert_close(images, preprocessing.to_input(data.train.pixels[indices]))
    assert images.shape == (32, 1, 16, 16)


def test_synthetic_noise_is_made_to_measure():
    data = load("synthetic", num_classes=10, num_images=200, test_fraction=0.1)
    assert data.train.pixels.shape[1:] == (3, 16, 16)
    assert len(data.classes) == 10
    assert len(data.train) + len(data.val) + len(data.test) == 200


def test_small_images_are_erased_and_mixed_after_normalising():
    data = load("digits", test_fraction=0.2)
    preprocessing = Preprocessing((8, 8), 1, (0.3,), (0.4,), None, "bilinear")
    order, transform = (
        SampleOrder(len(data.train), 32, 0),
        TrainingTransform(preprocessing, None, 0.0),
    )
    plain = BatchAugmentation(0, (8, 8), 0.0, None, 0.0)
    mixing = MixupCutmix(0, 10, 0.0, 1.0, 1.0)
    mixed, targets = next(
        training_batches(
            data.train,
            order,
            3,
            4,
            preprocessing,
            Augmentation(transform, plain, 0.7, mixing),
            0,
            CPU,
        )
    )
    epochs, indices = order.batch(3)
    images = random_erase(
        preprocessing.to_input(data.train.pixels[indices]), epochs, indices, 0, 0.7
    )
    expected, shares = mixing(images, data.train.labels[indices], 3)
    assert torch.equal(mixed, expected)
    assert torch.equal(targets, shares)
    assert targets.shape == (32, 10)
