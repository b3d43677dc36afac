"""A teacher from a file: what it is asked, about which classes, and by which bytes it is known."""

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
from foreign_models import own_checkpoint, own_model
from safetensors.torch import save_file
from small_training import CPU

from vit.data.class_folders import imagenet_wnids
from vit.data.preprocessing import Preprocessing
from vit.errors import CheckpointError
from vit.model.cost import count_macs
from vit.model.vision_transformer import VisionTransformer
from vit.runtime.precision import Precision
from vit.training import teacher as teachers
from vit.training.teacher import Teacher, make_teacher
from vit.weights.description import Weights
from vit.weights.identity import sha256_of
from vit.weights.loading import read

STUDENT = Preprocessing((8, 8), 3, (0.5,), (0.5,), None, "bilinear")


def weights_of(classes, num_classes=None, preprocessing=STUDENT, path=Path("teacher.safetensors")):
    """Weights of a small model whose head tells its classes apart."""
    count = num_classes or len(classes)
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    model = VisionTransformer(num_classes=count, **sizes)
    torch.nn.init.normal_(model.head.weight)
    arguments = {
        **sizes,
        "num_classes": count,
        "num_channels": 3,
        "activation": "gelu",
        "layer_norm_eps": 1e-6,
        "fc_norm": False,
        "global_pool": "cls",
        "cls_position": True,
    }
    return Weights(
        path, "made up", model.state_dict(), arguments, preprocessing=preprocessing, classes=classes
    )


@pytest.fixture(autouse=True)
def without_a_file(monkeypatch):
    monkeypatch.setattr(teachers, "sha256_of", lambda path, is_own: "0" * 64)


def made(weights, classes, student=STUDENT) -> Teacher:
    return make_teacher("teacher.safetensors", weights, classes, student)


def images(count=4, channels=3, size=8):
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, size, size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def test_what_takes_the_same_images_gets_them_as_they_are():
    spelled_out = dataclasses.replace(STUDENT, mean=(0.5, 0.5, 0.5), eval_crop=0.9)
    teacher = made(weights_of(["a", "b"], preprocessing=spelled_out), ["a", "b"])
    batch = STUDENT.to_input(images())
    assert teacher.adapt(batch) is batch
    assert teacher.notes == []


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.3, 0.4)}, None),
        ({"image_size": (16, 12)}, "from 8 x 8 to 16 x 12 px"),
        ({"image_size": (4, 4), "interpolation": "bicubic"}, "from 8 x 8 to 4 x 4 px"),
        ({"num_channels": 1, "mean": (0.3,), "std": (0.4,)}, "its 1 channels"),
    ],
)
def test_it_gets_the_images_as_its_own_preprocessing_would_give_them(changes, note):
    own = dataclasses.replace(STUDENT, **changes)
    teacher = made(weights_of(["a", "b"]), ["a", "b"])
    teacher.model.preprocessing = own
    # Gray is rounded to whole levels where pixels are
    tolerance = 1 / 255 / min(own.std) if own.num_channels == 1 else 1e-5
    torch.testing.assert_close(
        teacher.adapt(STUDENT.to_input(images())),
        own.to_input(images()),
        atol=tolerance,
        rtol=0,
    )
    notes = teachers.difference_notes(STUDENT, own)
    assert [note in line for line in notes] == ([] if note is None else [True])


def test_a_teacher_of_color_sees_gray_images_thrice():
    gray = Preprocessing((8, 8), 1, (0.3,), (0.4,), None, "bilinear")
    teacher = made(weights_of(["a", "b"]), ["a", "b"], student=gray)
    expected = STUDENT.to_input(images(channels=1))
    torch.testing.assert_close(teacher.adapt(gray.to_input(images(channels=1))), expected)
    assert teacher(gray.to_input(images(channels=1))).shape == (4, 2)


def test_noise_beyond_black_and_white_is_kept():
    """Erased boxes are filled with it."""
    own = dataclasses.replace(STUDENT, mean=(0.25,), std=(0.25,))
    teacher = made(weights_of(["a", "b"], preprocessing=own), ["a", "b"])
    batch = 5 * torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(teacher.adapt(batch), 2 * batch + 1)


def test_classes_are_matched_by_name():
    weights = weights_of(["dog", "cat", "bird", "fish"])
    whole = made(weights, ["dog", "cat", "bird", "fish"])
    assert whole.outputs is None
    teacher = made(weights, ["cat", "fish", "dog"])
    batch = STUDENT.to_input(images())
    assert torch.equal(teacher(batch), whole(batch)[:, [1, 3, 0]])
    assert any("4 classes" in note and "3" in note for note in teacher.notes)


def test_a_thousand_classes_without_names_are_imagenets():
    wnids = list(imagenet_wnids())
    teacher = made(weights_of(None, num_classes=1000), [wnids[7], wnids[3]])
    assert teacher.outputs.tolist() == [7, 3]


def test_classes_without_names_are_the_data_sets_and_that_is_said():
    teacher = made(weights_of(None, num_classes=2), ["a", "b"])
    assert teacher.outputs is None
    assert any("names no classes" in note for note in teacher.notes)


@pytest.mark.parametrize(
    ("weights", "classes", "message"),
    [
        (weights_of(["a", "b"]), ["a", "c", "d"], r"does not know 2 of the data set's 3 .*: c, d"),
        (weights_of(["a", "a", "b"]), ["a", "b"], r"does not know 1 .*: a"),
        (weights_of(None, num_classes=3), ["a", "b"], r"3 classes without names, .* 2"),
    ],
)
def test_unknown_classes_are_refused_in_one_line(weights, classes, message):
    with pytest.raises(
        CheckpointError, match=rf"^train\.teacher: teacher.safetensors: .*{message}"
    ):
        made(weights, classes)


def test_weights_without_a_head_teach_nothing():
    weights = weights_of(["a", "b"])
    del weights.model["num_classes"]
    with pytest.raises(CheckpointError, match=r"^train\.teacher: .*holds no head"):
        made(weights, ["a", "b"])


def test_a_file_without_normalization_is_taken_for_the_usual_and_that_is_said():
    teacher = made(weights_of(["a", "b"], preprocessing=None), ["a", "b"])
    assert teacher.model.preprocessing.mean == (0.5, 0.5, 0.5)
    assert any("0.5 are assumed" in note for note in teacher.notes)


def test_its_cost_is_known():
    teacher = made(weights_of(["a", "b"]), ["a", "b"])
    assert teacher.macs == count_macs(teacher.model) > 0
    # The last block computes the class token alone
    assert 0 < teacher.flops < 2 * teacher.macs


@pytest.mark.parametrize(("mode", "compiled"), [("blocks", 0), (True, 1), ("graphs", 1)])
def test_it_is_compiled_as_the_student_is(monkeypatch, mode, compiled):
    """With graphs without graphs, which would overwrite its logits."""
    options, blocks = [], []
    monkeypatch.setattr("vit.runtime.compiling.missing_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda model, **kw: options.append(kw) or model)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: blocks.append(self))
    teacher = made(weights_of(["a", "b"]), ["a", "b"])
    teacher.compile(mode, Precision("fp32", CPU))
    assert [item["mode"] for item in options] == [None] * compiled
    assert len(blocks) == 1 - compiled
    assert teacher(STUDENT.to_input(images())).shape == (4, 2)


def test_a_file_is_known_by_its_own_checksum(tmp_path):
    path = tmp_path / "best.safetensors"
    own_checkpoint(path, own_model())
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert sha256_of(path, is_own=True) == expected
    # Beside a checkpoint of this project no other file matters
    (tmp_path / "config.json").write_text("{}")
    assert sha256_of(path, is_own=True) == expected
    assert sha256_of(path, is_own=False) != expected


def test_several_files_are_known_together(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    for name in ("1", "2"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    first = sha256_of(index, is_own=False)
    assert first == sha256_of(index, is_own=False)
    save_file({"a": torch.ones(1)}, tmp_path / "2.safetensors")
    assert sha256_of(index, is_own=False) != first


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: can't be read"):
        sha256_of(tmp_path / "gone.safetensors", is_own=True)


def test_a_checkpoint_is_read_with_its_classes(tmp_path):
    own_checkpoint(tmp_path / "best.safetensors", own_model())
    weights = read(tmp_path / "best.safetensors")
    teacher = made(weights, weights.classes, weights.preprocessing)
    assert teacher.outputs is None
    assert teacher.model.preprocessing == weights.preprocessing
