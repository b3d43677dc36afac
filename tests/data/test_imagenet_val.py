"""ImageNet's flat val folder, with each of the files that label it."""

import os
import shutil
import tarfile

import pytest
import torch
from small_imagenet import EXPECTED, WNIDS, image_name, load_imagenet, write_devkit
from torchvision.datasets import imagenet

from vit.data.imagenet_val import LABEL_FILES, list_flat_val
from vit.errors import DataError


def write_list(root, name):
    wnids = [WNIDS[position] for position in EXPECTED]
    rows = list(zip(range(1, 5), EXPECTED, wnids, strict=True))
    lines = {
        "imagenet_2012_validation_synset_labels.txt": wnids,
        "val.txt": [f"{image_name(number)}.JPEG {position}" for number, position, _ in rows],
        "LOC_val_solution.csv": [
            "ImageId,PredictionString",
            # In any order, and with several boxes
            *(
                f"{image_name(number)},{wnid} 1 2 3 4 {wnid} 5 6 7 8 "
                for number, _, wnid in rows[::-1]
            ),
        ],
    }[name]
    (root / name).write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def root(tmp_path):
    """train/<wnid>/ with two images each, and a flat val with four empty ones."""
    for wnid in WNIDS:
        (tmp_path / "train" / wnid).mkdir(parents=True)
        for number in range(20):
            (tmp_path / "train" / wnid / f"{number}.JPEG").touch()
    (tmp_path / "val").mkdir()
    for number in range(1, 5):
        (tmp_path / "val" / f"{image_name(number)}.JPEG").touch()
    return tmp_path


def test_every_kind_of_file_is_tested():
    assert len(LABEL_FILES) == 4
    assert next(iter(LABEL_FILES)) == "ILSVRC2012_validation_ground_truth.txt"


@pytest.mark.parametrize("place", [".", "val"])
@pytest.mark.parametrize("name", list(LABEL_FILES))
def test_the_images_are_labeled(root, name, place):
    if name == "ILSVRC2012_validation_ground_truth.txt":
        write_devkit(root)
        if place == "val":
            for file in (root / "ILSVRC2012_devkit_t12" / "data").iterdir():
                shutil.move(file, root / "val" / file.name)
    else:
        write_list(root / place, name)
    images = list_flat_val(root / "val", WNIDS, "title")
    assert images.labels.tolist() == EXPECTED
    names = [f"{root}/val/{image_name(number)}.JPEG" for number in range(1, 5)]
    assert [os.fsdecode(path) for path in images.paths.tolist()] == names


def test_torchvision_reads_the_same_development_kit(root, monkeypatch):
    write_devkit(root)
    archive = "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(root / archive, "w:gz") as tar:
        tar.add(root / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
    monkeypatch.setattr(imagenet, "check_integrity", lambda *arguments: True)
    imagenet.parse_devkit_archive(str(root))
    _, wnids = torch.load(root / imagenet.META_FILE)
    assert wnids == [WNIDS[position] for position in EXPECTED]


def test_data_imagenet_takes_a_flat_val_as_test(root):
    write_devkit(root)
    data = load_imagenet(root, val_fraction=0.1)
    assert data.classes == WNIDS
    assert data.test.labels.tolist() == EXPECTED
    assert data.test.title == f"{root.name} val, used as test"
    assert len(data.train) == 54


def spoil(name, text):
    return lambda root: (root / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: None, r"/val: holds images, but no class folders and no file that labels"),
        (spoil("val.txt", "a.JPEG cat\n"), r"val\.txt: line 1, 'a\.JPEG cat', is not a file name"),
        (spoil("val.txt", "a.JPEG 3\n"), r"val\.txt: line 1, .* a number below 3"),
        (spoil("LOC_val_solution.csv", "a,b\nx,cat 1\n"), "line 2, 'x,cat 1', names no wnid"),
        (
            spoil("imagenet_2012_validation_synset_labels.txt", "n01440764\ncat\n"),
            r"labels\.txt: line 2, 'cat', is not a wnid",
        ),
        (
            spoil("imagenet_2012_validation_synset_labels.txt", "n01440764\n"),
            "its classes are not those of train: it lacks n01443537, n01484850",
        ),
        (
            spoil("ILSVRC2012_validation_ground_truth.txt", "1\n"),
            r"ground_truth\.txt: meta\.mat of the development kit is needed",
        ),
    ],
)
def test_labels_that_cannot_be_understood_are_refused(root, change, message):
    change(root)
    with pytest.raises(DataError, match=message):
        list_flat_val(root / "val", WNIDS, "title")


@pytest.mark.parametrize("content", [b"", b"no matrix", b"MATLAB 5.0 MAT-file" + b"\0" * 200])
def test_a_damaged_meta_file_is_refused(root, content):
    write_devkit(root)
    (root / "ILSVRC2012_devkit_t12" / "data" / "meta.mat").write_bytes(content)
    with pytest.raises(DataError, match=r"meta\.mat: not the meta\.mat of ILSVRC 2012"):
        list_flat_val(root / "val", WNIDS, "title")


def test_an_unknown_number_is_refused(root):
    write_devkit(root)
    truth = root / "ILSVRC2012_devkit_t12" / "data" / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("3\n7\n1\n2\n")
    with pytest.raises(DataError, match=r"line 2, '7', is not a class of meta\.mat"):
        list_flat_val(root / "val", WNIDS, "title")


def test_images_and_labels_have_to_belong_together(root):
    write_devkit(root)
    (root / "val" / f"{image_name(2)}.JPEG").unlink()
    with pytest.raises(DataError, match=r"labels, but the folder lacks, ILSVRC2012_val_00000002"):
        list_flat_val(root / "val", WNIDS, "title")
    (root / "val" / f"{image_name(2)}.JPEG").touch()
    (root / "val" / "another.jpg").touch()
    with pytest.raises(DataError, match=r"does not label another \(and 0 others\)"):
        list_flat_val(root / "val", WNIDS, "title")
