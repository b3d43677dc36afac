"""python -m vit.export: what is written opens in its own library, and gives the same logits there.

Read back it is the same, tensor for tensor.
"""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torchvision
from foreign_models import SIZES, TOLERANCE, difference, images, own_checkpoint, own_model
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTModel

import vit
from vit.data.preprocessing import Preprocessing
from vit.errors import CheckpointError, ConfigError, run_command
from vit.export import FORMATS, export, main
from vit.model.vision_transformer import VisionTransformer
from vit.weights import huggingface, own
from vit.weights import timm as timm_format
from vit.weights.description import PLAIN
from vit.weights.loading import build, read
from vit.weights.onnx import new_metadata
from vit.weights.writing import WRITERS


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small models are faster by one thread, tenfold where other processes share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def checkpoint(folder, **changes):
    """(our model, its checkpoint)."""
    model = own_model(**changes)
    own_checkpoint(folder / "best.safetensors", model, **changes)
    return model, folder / "best.safetensors"


def same_tensors(path, model) -> bool:
    tensors, expected = read(path).tensors, model.state_dict()
    return tensors.keys() == expected.keys() and all(
        torch.equal(tensors[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("patch", [16, 32])
@pytest.mark.parametrize("size", SIZES)
def test_hugging_face(tmp_path, size, patch):
    width, heads = SIZES[size]
    ours, path = checkpoint(
        tmp_path, image_size=64, patch_size=patch, hidden_size=width, num_heads=heads
    )
    export(path, "hf", tmp_path / "hf")
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "hf").eval()
    assert difference(ours, theirs) < TOLERANCE
    assert theirs.config.id2label == dict(enumerate("abcde"))
    assert same_tensors(tmp_path / "hf", ours)


def test_hugging_face_with_other_settings(tmp_path):
    ours, path = checkpoint(
        tmp_path,
        activation="gelu_tanh",
        layer_norm_eps=1e-3,
        qkv_bias=False,
        position="sincos2d",
        num_channels=1,
    )
    export(path, "hf", tmp_path / "hf")
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "hf").eval()
    base = ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    batch = images(32, 1)
    with torch.inference_mode():
        logits, sequence = theirs(batch).logits, base(batch).last_hidden_state
        trace = ours.trace(batch)
        assert (logits - ours(batch)).abs().max() < TOLERANCE
        assert (sequence - trace.sequence).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_registers": 3, "layer_scale": 0.1},
        {"cls_token": False, "global_pool": "mean"},
        {"global_pool": "mean"},
        {"activation": "gelu_tanh", "qkv_bias": False},
        {"qk_norm": True, "cls_position": False},
        {
            "image_size": 64,
            "patch_size": 16,
            "resnet_stages": [3, 4, 9],
            "resnet_style": "timm",
            "num_layers": 1,
        },
        {"position": "sincos1d"},
    ],
    ids=str,
)
def test_timm(tmp_path, changes):
    ours, path = checkpoint(tmp_path, **changes)
    export(path, "timm", tmp_path / "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert difference(ours, theirs, changes.get("image_size", 32)) < TOLERANCE
    if "position" not in changes and changes.get("cls_position", True):
        assert same_tensors(tmp_path / "timm", ours)
    if "image_size" not in changes:
        expected = Preprocessing((32, 32), 3, (0.5,), (0.5,), None, "bilinear")
        assert read(tmp_path / "timm").preprocessing == expected


@pytest.mark.parametrize("representation_size", [None, 48])
def test_torchvision(tmp_path, representation_size):
    ours, path = checkpoint(tmp_path, representation_size=representation_size)
    notes = export(path, "torchvision", tmp_path / "vit.pth")
    # The note is what a user pastes
    call = notes[0].removeprefix("open with ").replace("FILE", repr(str(tmp_path / "vit.pth")))
    model, _, loading = call.partition(".load_state_dict")
    names = {"torch": torch, "torchvision": torchvision}
    theirs = eval(model, names)
    eval(f"theirs.load_state_dict{loading}", {"theirs": theirs, **names})
    assert difference(ours, theirs.eval(), 32) < TOLERANCE
    assert same_tensors(tmp_path / "vit.pth", ours)


def test_npz(tmp_path):
    ours, path = checkpoint(tmp_path, activation="gelu_tanh")
    assert export(path, "npz", tmp_path / "weights.npz") == []
    theirs = timm_of_npz(tmp_path / "weights.npz", "vit_base_patch16_224", 32, patch_size=8)
    assert difference(ours, theirs, 32) < TOLERANCE
    assert same_tensors(tmp_path / "weights.npz", ours)
    assert read(tmp_path / "weights.npz").model["num_heads"] == 1


def test_npz_of_a_hybrid(tmp_path):
    hybrid = {"resnet_stages": [3, 4, 9], "image_size": 64, "patch_size": 16}
    ours, path = checkpoint(tmp_path, activation="gelu_tanh", **hybrid)
    export(path, "npz", tmp_path / "weights.npz")
    assert same_tensors(tmp_path / "weights.npz", ours)
    theirs = timm_of_npz(tmp_path / "weights.npz", "vit_base_r50_s16_224", 64)
    # The same tensors with timm's own standardization
    arguments = {**read(path).model, "num_classes": 5, "resnet_style": "timm"}
    timm_style = VisionTransformer(**arguments).eval()
    timm_style.load_state_dict(ours.state_dict())
    assert difference(timm_style, theirs, 64) < TOLERANCE


def timm_of_npz(path, name, image_size, **changes):
    """timm's model with the sizes of own_model, and weights that timm itself has loaded."""
    model = timm.create_model(
        name,
        embed_dim=64,
        depth=2,
        num_heads=1,
        img_size=image_size,
        act_layer="gelu_tanh",
        num_classes=5,
        **changes,
    )
    model.load_pretrained(str(path))
    return model.eval()


def test_npz_with_pre_logits_and_without_a_class_token(tmp_path):
    ours, path = checkpoint(
        tmp_path, representation_size=48, cls_token=False, global_pool="mean", num_heads=4
    )
    assert "doesn't tell the activation" in export(path, "npz", tmp_path / "x.npz")[0]
    assert same_tensors(tmp_path / "x.npz", ours)
    assert read(tmp_path / "x.npz").model["num_heads"] == 4
    assert read(tmp_path / "x.npz").model["global_pool"] == "mean"


def test_safetensors(tmp_path):
    ours, path = checkpoint(tmp_path)
    export(path, "safetensors", tmp_path / "again.safetensors")
    tensors = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in ours.state_dict().items())
    assert vit.load(tmp_path / "again.safetensors").classes == list("abcde")


def test_weights_of_another_library_become_a_checkpoint(tmp_path):
    ours, path = checkpoint(tmp_path)
    export(path, "timm", tmp_path / "timm")
    export(tmp_path / "timm", "safetensors", tmp_path / "converted")
    loaded = vit.load(tmp_path / "converted")
    assert difference(loaded, ours, 32) == 0
    assert loaded.preprocessing == read(path).preprocessing


def test_what_was_assumed_is_said_since_the_new_file_states_it(tmp_path):
    ours, path = checkpoint(tmp_path)
    assert export(path, "timm", tmp_path / "timm") == []
    assert export(tmp_path / "timm", "hf", tmp_path / "stated") == []
    (tmp_path / "timm" / "config.json").unlink()
    notes = export(tmp_path / "timm", "hf", tmp_path / "assumed")
    keys = [note.partition("=")[0] for note in notes]
    assert keys == ["num_heads", "layer_norm_eps", "activation", "global_pool", "image_size"]
    assert difference(build(tmp_path / "assumed"), ours, 32) < TOLERANCE


def test_surplus_tensors_are_refused_in_every_format(tmp_path):
    """A checkpoint would be written that vit.load refuses."""
    bare, surplus = tmp_path / "bare", {"extra.weight": torch.zeros(3)}
    save_file(own_model().state_dict() | surplus, bare)
    for kind in FORMATS:
        with pytest.raises(CheckpointError, match=r"extra\.weight") as caught:
            export(bare, kind, tmp_path / "out")
        assert str(caught.value).startswith(str(bare))
    assert [item.name for item in tmp_path.iterdir()] == ["bare"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_registers": 2, "global_pool": "mean", "position": "rope2d", "qk_norm": True},
        {"conv_stem": [16, 32], "conv_stem_strides": [1, 2]},
    ],
    ids=["plain", "variants", "conv_stem"],
)
def test_onnx(tmp_path, changes):
    onnxruntime = pytest.importorskip("onnxruntime")
    ours, path = checkpoint(tmp_path, **changes)
    assert "differ from PyTorch's by at most" in export(path, "onnx", tmp_path / "vit.onnx")[0]
    session = onnxruntime.InferenceSession(tmp_path / "vit.onnx")
    for batch_size in (1, 5):  # it is dynamic
        batch = torch.randn(batch_size, 3, 32, 32)
        (logits,) = session.run(None, {"images": batch.numpy()})
        with torch.inference_mode():
            assert np.abs(logits - ours(batch).numpy()).max() < TOLERANCE
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list("abcde")
    assert json.loads(metadata["preprocessing"])["image_size"] == [32, 32]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["best.safetensors", "vit.onnx"]


@pytest.fixture
def image_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((300, 200), Image.Resampling.BICUBIC)
    image.save(tmp_path / "x.jpg", quality=95)
    return tmp_path / "x.jpg"


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing((32, 32), 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), None, "bicubic"),
        Preprocessing((32, 32), 3, (0.5,), (0.5,), 0.8, "bilinear"),
    ],
    ids=["squash", "crop"],
)
def test_exported_preprocessing_gives_our_pixels(tmp_path, image_file, preprocessing):
    _, path = checkpoint(tmp_path)
    weights = replace(read(path), preprocessing=preprocessing, header=None)
    huggingface.write(weights, tmp_path / "hf")
    timm_format.write(weights, tmp_path / "timm")
    own.write(weights, tmp_path / "own")

    ours = preprocessing(image_file)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    transform = create_transform(**resolve_data_config({}, model=theirs))
    with Image.open(image_file) as image:
        assert torch.equal(preprocessing(image), ours)
        processed = processor(image, return_tensors="pt").pixel_values[0]
        assert (processed - ours).abs().max() < 1e-5
        assert (transform(image) - ours).abs().max() < 1e-5

    for name in ("hf", "timm", "own"):
        again = read(tmp_path / name).preprocessing
        for field in ("image_size", "eval_crop", "interpolation"):
            assert getattr(again, field) == getattr(preprocessing, field)
        assert torch.equal(again(image_file), ours)


def test_the_preprocessing_is_exported_at_the_models_size(tmp_path):
    """DINOv2's positions are of larger images than its preprocessing makes."""
    _, path = checkpoint(tmp_path)
    half = (0.5, 0.5, 0.5)
    smaller = Preprocessing((16, 16), 3, half, half, 0.8, "bilinear")
    weights = replace(read(path), preprocessing=smaller, header=None)
    huggingface.write(weights, tmp_path / "hf")
    timm_format.write(weights, tmp_path / "timm")
    own.write(weights, tmp_path / "own")
    for name in ("hf", "timm", "own"):
        assert read(tmp_path / name).preprocessing == replace(smaller, image_size=(32, 32))
    stated = json.loads(new_metadata(weights)["preprocessing"])
    assert stated["image_size"] == [32, 32]


def test_a_crop_of_oblong_images_is_refused_by_hugging_face(tmp_path):
    """Its processor would fill the model's width with black."""
    _, path = checkpoint(tmp_path, image_size=[32, 64])
    preprocessing = Preprocessing((32, 64), 3, (0.5,), (0.5,), 0.8, "bilinear")
    weights = replace(read(path), preprocessing=preprocessing, header=None)
    with pytest.raises(CheckpointError, match=r"eval_crop=0\.8 with images of 32x64 px"):
        huggingface.write(weights, tmp_path / "hf")


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        ("hf", {"num_registers": 1}, "num_registers=1"),
        ("hf", {"representation_size": 8}, "representation_size=8"),
        ("hf", {"cls_token": False, "global_pool": "mean"}, "global_pool=mean"),
        ("timm", {"representation_size": 8}, "representation_size=8"),
        ("timm", {"layer_norm_eps": 1e-3}, r"layer_norm_eps=0\.001"),
        ("timm", {"position": "rope2d"}, "position=rope2d"),
        ("timm", {"activation": "relu2"}, "timm can't express activation=relu2"),
        ("timm", {"resnet_stages": [1], "patch_size": 4}, r"resnet_stages=\[1\]"),
        ("timm", {"conv_stem": [16]}, r"timm can't express conv_stem=\[16\]"),
        ("hf", {"conv_stem": [16]}, r"conv_stem=\[16\]"),
        ("npz", {"conv_stem": [16]}, r"conv_stem=\[16\]"),
        ("torchvision", {"conv_stem": [16]}, r"conv_stem=\[16\]"),
        ("torchvision", {"activation": "gelu_tanh"}, "activation=gelu_tanh"),
        ("npz", {"qk_norm": True}, "qk_norm=True"),
        ("torchvision", {"num_channels": 1}, "takes 3 channels"),
        ("npz", {"global_pool": "mean"}, "a class token beside global_pool=mean"),
        ("hf", {"pruned_heads": {"0": [1]}, "num_heads": 2}, "pruned_heads"),
    ],
    ids=str,
)
def test_what_a_format_cannot_express_is_refused(tmp_path, kind, changes, problem):
    arguments = dict(changes)
    if "pruned_heads" in changes:
        arguments["pruned_heads"] = {0: [1]}
    own_checkpoint(tmp_path / "x", own_model(**arguments), **changes)
    with pytest.raises(CheckpointError, match=problem) as caught:
        export(tmp_path / "x", kind, tmp_path / "out")
    assert str(caught.value).startswith(str(tmp_path / "x"))
    assert [item.name for item in tmp_path.iterdir()] == ["x"]


def test_onnx_that_is_not_installed(tmp_path, monkeypatch):
    _, path = checkpoint(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name)
    )
    message = "needs onnx; install with: pip install onnx onnxscript onnxruntime"
    with pytest.raises(ConfigError, match=message):
        export(path, "onnx", tmp_path / "vit.onnx")


def command(*arguments: object) -> int:
    return run_command("vit.export", lambda: main([str(argument) for argument in arguments]))


@pytest.mark.parametrize("kind", ["hf", "timm", "torchvision", "npz"])
def test_a_setting_that_no_format_knows_of_is_refused(tmp_path, monkeypatch, kind):
    """As one is that somebody adds to the model: it would be left out in silence."""
    _, path = checkpoint(tmp_path, pre_norm=True)
    monkeypatch.delitem(PLAIN, "pre_norm")
    with pytest.raises(CheckpointError, match="can't express pre_norm=True"):
        WRITERS[kind](read(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line(tmp_path, capsys):
    _, path = checkpoint(tmp_path)
    out = tmp_path / "new" / "vit.pth"
    assert command(path, "--format", "torchvision", "--out", out) == 0
    assert f"written to {out}" in capsys.readouterr().out
    assert build(out).head.out_features == 5


def test_mistakes_are_one_line(tmp_path, capsys):
    _, path = checkpoint(tmp_path)
    (tmp_path / "taken").write_text("a file")
    for source, out, message in (
        (path, tmp_path / "taken", f"--out {tmp_path / 'taken'}: is there already"),
        (tmp_path / "no", tmp_path / "hf", f"{tmp_path / 'no'}: "),
        (path, path / "below", f"--out {path / 'below'}: can't write there"),
    ):
        assert command(source, "--format", "hf", "--out", out) == 2
        errors = capsys.readouterr().err
        assert errors.startswith(f"vit.export: {message}")
        assert errors.count("\n") == 1
    assert (tmp_path / "taken").read_text() == "a file"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["best.safetensors", "taken"]


def test_every_format_has_a_writer():
    assert list(FORMATS) == list(WRITERS)
