import os
import pickle
import shutil
import urllib.error

import numpy as np
import pytest
import torch
from helpers import make_images
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

from vit.data.datasets import DATASETS, DatasetReader, Splits, check_dataset, load_data
from vit.data.splits import ImageSplit
from vit.errors import ConfigError, DataError

SETTINGS = {
    "root": None,
    "val_fraction": 0.1,
    "test_fraction": None,
    "limit": None,
    "image_size": (16, 16),
    "num_channels": 3,
    "device": torch.device("cpu"),
}
# The keys that only some data sets take
SPECIFIC = ("num_classes", "num_images", "label_column")


def load(name, **changes):
    specific = {key: changes.pop(key, None) for key in SPECIFIC}
    return load_data(name=name, settings=specific, **{**SETTINGS, **changes})


def check(name, **changes):
    specific = {key: changes.pop(key, None) for key in SPECIFIC}
    unset = {"root": None, "test_fraction": None}
    check_dataset(name=name, settings=specific, **{**unset, **changes})


def sizes(data):
    return [len(data.train), len(data.val), len(data.test)]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("digits", {"test_fraction": 0.2}),
        ("cifar10", {"root": "data"}),
        ("cifar100", {"root": "data"}),
        ("tiny_imagenet", {"root": "data"}),
        ("imagenet", {"root": "data"}),
        ("folder", {"root": "data", "test_fraction": 0.2}),
        ("shards", {"root": "data", "test_fraction": 0.2}),
        ("synthetic", {"test_fraction": 0.2, "num_classes": 4, "num_images": 10}),
    ],
)
def test_settings_are_checked_before_anything_is_read(name, settings):
    check(name, **settings)
    for key in settings:
        missing = {**settings, key: None}
        with pytest.raises(ConfigError, match=rf"data={name} needs data\.{key}"):
            check(name, **missing)
        with pytest.raises(ConfigError, match=rf"data={name} needs data\.{key}"):
            load(name, **missing)
    others = {"root": "data", "test_fraction": 0.2, "num_classes": 4, "num_images": 10}
    for key in others.keys() - settings.keys():
        superfluous = {**settings, key: others[key]}
        with pytest.raises(ConfigError, match=rf"data\.{key} does nothing with data={name}; .*"):
            check(name, **superfluous)


def test_every_data_set_of_the_table_is_checked_above():
    parameters = test_settings_are_checked_before_anything_is_read.pytestmark[0].args[1]
    assert {name for name, _ in parameters} == set(DATASETS)


def test_a_key_that_does_nothing_names_the_data_sets_that_it_belongs_to():
    with pytest.raises(ConfigError, match=r"belongs to digits, folder, shards, synthetic$"):
        check("cifar10", root="data", test_fraction=0.1)
    with pytest.raises(ConfigError, match=r"belongs to synthetic$"):
        check("digits", test_fraction=0.1, num_classes=3)


def test_an_unknown_data_set_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"data\.name must be one of digits, .*, got mnist"):
        check("mnist")
    with pytest.raises(ConfigError, match=r"data\.name .* got mnist"):
        load("mnist")


def test_a_new_data_set_is_one_entry(monkeypatch):
    """Its keyword-only parameters are its keys; one with a default need not be given."""

    def read_dots(request, *, num_images, num_classes=2):
        labels = torch.arange(num_images) % num_classes
        pixels = torch.zeros(num_images, *request.image_shape, dtype=torch.uint8)
        return Splits(list("ab"), ImageSplit(request.title, labels, pixels))

    reader = DatasetReader(read_dots, "some dots", needs_root=False, cuts_test=True)
    monkeypatch.setitem(DATASETS, "dots", reader)
    data = load("dots", num_images=40, test_fraction=0.5)
    assert sizes(data) == [18, 2, 20]
    assert data.train.title == "some dots"
    with pytest.raises(ConfigError, match=r"data=dots needs data\.num_images"):
        check("dots", test_fraction=0.5)


def test_digits_are_scikit_learns_and_split_by_class():
    data = load("digits", val_fraction=0.2, test_fraction=0.2)
    assert sizes(data) == [1151, 287, 359]
    splits = (data.train, data.val, data.test)
    pixels = torch.cat([split.pixels for split in splits]).reshape(-1, 64)
    labels = torch.cat([split.labels for split in splits])
    levels = (pixels / 255 * 16).round().int().tolist()
    ours = {(tuple(row), label) for row, label in zip(levels, labels.tolist(), strict=True)}
    images, targets = load_digits(return_X_y=True)
    assert ours == {
        (tuple(row), label)
        for row, label in zip(images.astype(int).tolist(), targets.tolist(), strict=True)
    }
    for split in (data.val, data.test):
        counts = torch.bincount(split.labels)
        assert counts.max() - counts.min() <= 2


def test_a_limit_holds_for_every_split():
    assert sizes(load("digits", test_fraction=0.2, limit=30)) == [30, 30, 30]


def test_the_test_split_does_not_depend_on_the_validation_split():
    with_val = load("digits", test_fraction=0.2, val_fraction=0.3)
    without = load("digits", test_fraction=0.2, val_fraction=0.0)
    assert without.val is None
    assert torch.equal(with_val.test.pixels, without.test.pixels)


def write_cifar10(root, monkeypatch, per_batch=20):
    """The official layout with fewer images, and without torchvision's MD5 check of the files."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for number, name in enumerate(names):
        pixels = generator.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        labels = [(image + number) % 10 for image in range(per_batch)]
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    meta = {"label_names": [f"class {label}" for label in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    return folder


def test_cifar_files_are_read_and_val_is_held_out_of_train(tmp_path, monkeypatch):
    folder = write_cifar10(tmp_path, monkeypatch)
    data = load("cifar10", root=str(tmp_path))
    assert data.classes == [f"class {label}" for label in range(10)]
    assert sizes(data) == [90, 10, 20]
    assert data.train.pixels.shape == (90, 3, 32, 32)
    assert data.train.pixels.dtype == torch.uint8
    first = pickle.loads((folder / "test_batch").read_bytes())["data"][0]
    assert np.array_equal(data.test.pixels[0].flatten().numpy(), first)
    assert str(data.test) == "CIFAR-10 test, 20 images"
    assert load("cifar10", root=str(tmp_path), val_fraction=0.0).val is None


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch, name):
    def no_network(*arguments, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(DataError, match=rf"{tmp_path}/cifar-.*no network.*experiment=digits"):
        load(name, root=str(tmp_path))


def test_a_folder_with_all_splits(tmp_path):
    root = make_images(tmp_path, {"train": 6, "val": 3, "test": 2})
    data = load("folder", root=str(root), test_fraction=0.1)
    assert sizes(data) == [12, 6, 4]
    assert data.classes == ["cat", "dog"]


def test_a_folder_with_train_alone(tmp_path):
    root = make_images(tmp_path, {"train": 10})
    data = load("folder", root=str(root), test_fraction=0.2)
    assert sizes(data) == [14, 2, 4]
    assert torch.bincount(data.test.labels).tolist() == [2, 2]
    paths = [set(split.paths.tolist()) for split in (data.train, data.val, data.test)]
    assert len(set.union(*paths)) == 20
    assert data.test.title == f"{root.name} train (a part of it), used as test"


@pytest.mark.parametrize(("val", "test"), [("validation", "testing"), ("Dev", "TEST")])
def test_a_folder_whose_splits_have_other_names(tmp_path, val, test):
    root = make_images(tmp_path, {"train": 6, val: 3, test: 2})
    data = load("folder", root=str(root), test_fraction=0.1)
    assert sizes(data) == [12, 6, 4]
    assert data.val.title == f"{root.name} {val}"
    assert data.test.title == f"{root.name} {test}"
    assert f"{val}/ and {test}/" in data.layout


def test_class_folders_alone_are_cut_into_the_splits(tmp_path):
    root = make_images(tmp_path / "pets", {".": 10})
    data = load("folder", root=str(root), test_fraction=0.2)
    assert sizes(data) == [14, 2, 4]
    assert data.classes == ["cat", "dog"]
    titles = [data.train.title, data.val.title, data.test.title]
    assert titles == ["pets", "pets, held out for validation", "pets (a part of it), used as test"]
    # The same cut as of the same images in a train folder
    make_images(tmp_path / "sorted", {"train": 10})
    other = load("folder", root=str(tmp_path / "sorted"), test_fraction=0.2)
    for ours, theirs in ((data.train, other.train), (data.val, other.val), (data.test, other.test)):
        assert ours.fingerprint() == theirs.fingerprint()


@pytest.mark.parametrize("key", ["val_fraction", "test_fraction"])
def test_a_fraction_of_a_split_that_is_there_is_refused(tmp_path, key):
    root = make_images(tmp_path, {"train": 6, "val": 3, "test": 2})
    settings = {"root": str(root), "test_fraction": 0.1}
    assert sizes(load("folder", **settings, typed=["root"])) == [12, 6, 4]
    with pytest.raises(ConfigError, match=rf"data\.{key} does nothing"):
        load("folder", **settings, typed=[key])
    alone = make_images(tmp_path / "alone", {".": 10})
    load("folder", root=str(alone), test_fraction=0.1, typed=[key])


def test_imagenets_layout_uses_val_as_test_and_says_so(tmp_path):
    root = make_images(tmp_path, {"train": 10, "val": 3}, ("n01440764", "n01443537"))
    data = load("imagenet", root=str(root))
    assert sizes(data) == [18, 2, 6]
    assert data.test.title == f"{root.name} val, used as test"
    assert data.classes == ["n01440764", "n01443537"]


def test_the_official_name_is_for_imagenets_classes_alone(tmp_path, monkeypatch):
    root = make_images(tmp_path, {"train": 2, "val": 2})
    monkeypatch.setattr("vit.data.datasets.is_imagenet", lambda classes: True)
    assert load("imagenet", root=str(root)).test.title == "ImageNet val, used as test"


def test_the_layout_of_tiny_imagenets_archive(tmp_path):
    for wnid in ("n1", "n2"):
        make_images(tmp_path / "train" / wnid, {".": 4}, ("images",))
    make_images(tmp_path, {"val": 4}, ("images",))
    lines = [f"{i}.jpg\tn{1 + i % 2}\t0\t0\t62\t62" for i in range(4)]
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    data = load("tiny_imagenet", root=str(tmp_path))
    assert data.classes == ["n1", "n2"]
    assert data.test.labels.tolist() == [0, 1, 0, 1]
    assert os.fsdecode(data.test.paths[1]) == str(tmp_path / "val" / "images" / "1.jpg")
    assert data.test.title == "Tiny-ImageNet val, used as test"


def test_tiny_imagenet_may_be_laid_out_like_imagenet(tmp_path):
    root = make_images(tmp_path, {"train": 4, "val": 2})
    data = load("tiny_imagenet", root=str(root))
    assert len(data.test) == 4
    assert "used as test" in data.test.title


@pytest.mark.parametrize("name", ["imagenet", "tiny_imagenet"])
def test_images_in_formats_that_are_not_read_are_told(tmp_path, name):
    root = make_images(tmp_path, {"train": 2, "val": 2})
    assert load(name, root=str(root)).layout == ""
    for file in ("train/cat/a.heic", "val/dog/b.heic"):
        (root / file).touch()
    assert load(name, root=str(root)).layout.startswith("2 .heic files can't be read")


@pytest.mark.parametrize("name", ["imagenet", "tiny_imagenet"])
def test_a_data_set_whose_test_is_val_needs_val(tmp_path, name):
    root = make_images(tmp_path, {"train": 2})
    with pytest.raises(DataError, match=rf"data={name}: no folder {root}/val"):
        load(name, root=str(root))


@pytest.mark.parametrize(
    ("name", "advice"),
    [("imagenet", "image-net.org"), ("tiny_imagenet", "unpack http")],
)
def test_a_missing_train_folder_says_how_to_get_the_images(tmp_path, name, advice):
    with pytest.raises(DataError, match=rf"data={name}: no folder {tmp_path}/train; .*{advice}"):
        load(name, root=str(tmp_path))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: [file.unlink() for file in (root / "train" / "dog").iterdir()],
            "train/dog: no images",
        ),
        (
            lambda root: (root / "val" / "dog").rename(root / "val" / "wolf"),
            "val: its classes .* lacks dog and has besides wolf",
        ),
        (lambda root: (root / "train" / "dog").rename(root / "dog"), r"train/ .*\(dog\) lie side"),
        (lambda root: shutil.rmtree(root / "train" / "dog"), "found 1 class folders"),
    ],
)
def test_inconsistent_folders_are_refused(tmp_path, spoil, message):
    root = make_images(tmp_path, {"train": 3, "val": 2})
    spoil(root)
    with pytest.raises(DataError, match=message):
        load("folder", root=str(root), test_fraction=0.2)


def test_a_split_without_any_image_is_refused(tmp_path):
    root = make_images(tmp_path, {"train": 1})
    with pytest.raises(DataError, match=r"used as test: no image is left; .*data\.test_fraction"):
        load("folder", root=str(root), test_fraction=0.2, val_fraction=0.0)


def test_synthetic_noise_has_the_requested_size():
    data = load("synthetic", num_classes=10, num_images=200, test_fraction=0.1)
    assert data.train.pixels.shape[1:] == (3, 16, 16)
    assert len(data.classes) == 10
    assert sum(sizes(data)) == 200
