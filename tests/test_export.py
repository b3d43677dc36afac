"""What is exported opens in its own library and gives the same logits there; read back it is the same, tensor for tensor."""

import importlib.util
import json

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from test_weights import (  # noqa: F401
    SIZES,
    TOLERANCE,
    _one_thread,
    difference,
    images,
    own_checkpoint,
    own_model,
)
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTModel

import vit
from vit.data.preprocessing import Preprocessing
from vit.errors import CheckpointError, ConfigError, run_command
from vit.export import FORMATS, export, main
from vit.weights import huggingface, own
from vit.weights import timm as timm_format
from vit.weights.loading import build, read


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


def picture(size: tuple[int, int] = (300, 200)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


# --- each library opens its own --------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [16, 32])
@pytest.mark.parametrize("size", SIZES)
def test_hugging_face(tmp_path, size, patch):
    width, heads = SIZES[size]
    ours, path = checkpoint(
        tmp_path, image_size=64, patch_size=patch, hidden_size=width, num_heads=heads
    )
    export(path, "hf", tmp_path / "hf")
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "hf").eval()
    assert difference(theirs_logits(theirs), ours) < TOLERANCE
    assert theirs.config.id2label == dict(enumerate("abcde"))
    assert same_tensors(tmp_path / "hf", ours)


def theirs_logits(model):
    return lambda x: model(x).logits


def test_hugging_face_with_other_settings(tmp_path):
    changes = dict(
        activation="gelu_tanh",
        layer_norm_eps=1e-3,
        qkv_bias=False,
        position="sincos2d",
        num_channels=1,
    )
    ours, path = checkpoint(tmp_path, **changes)
    export(path, "hf", tmp_path / "hf")
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "hf").eval()
    with torch.inference_mode():
        assert (theirs(images(32, 1)).logits - ours(images(32, 1))).abs().max() < TOLERANCE
    base = ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    with torch.inference_mode():
        assert (
            base(images(32, 1)).last_hidden_state - ours.trace(images(32, 1)).sequence
        ).abs().max() < TOLERANCE


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
    assert (
        read(tmp_path / "timm").preprocessing
        == Preprocessing((changes.get("image_size", 32),) * 2, 3, (0.5,), (0.5,), None, "bilinear")
        or "image_size" in changes
    )


@pytest.mark.parametrize("representation_size", [None, 48])
def test_torchvision(tmp_path, representation_size):
    ours, path = checkpoint(tmp_path, representation_size=representation_size)
    notes = export(path, "torchvision", tmp_path / "vit.pth")
    call = notes[0].removeprefix("open with ").replace("FILE", repr(str(tmp_path / "vit.pth")))
    model, _, loading = call.partition(".load_state_dict")
    theirs = eval(model)  # the note is what a user pastes
    eval(
        f"theirs.load_state_dict{loading}",
        {"theirs": theirs, "torch": torch, "torchvision": torchvision},
    )
    assert difference(ours, theirs.eval(), 32) < TOLERANCE
    assert same_tensors(tmp_path / "vit.pth", ours)


@pytest.mark.parametrize(
    "changes", [{}, {"resnet_stages": [3, 4, 9], "image_size": 64, "patch_size": 16}], ids=str
)
def test_npz(tmp_path, changes):
    ours, path = checkpoint(tmp_path, activation="gelu_tanh", **changes)
    export(path, "npz", tmp_path / "weights.npz")
    size = changes.get("image_size", 32)
    name, patch = (
        ("vit_base_r50_s16_224", {}) if changes else ("vit_base_patch16_224", {"patch_size": 8})
    )
    theirs = timm.create_model(
        name,
        embed_dim=64,
        depth=2,
        num_heads=1,
        img_size=size,
        act_layer="gelu_tanh",
        num_classes=5,
        **patch,
    )
    theirs.load_pretrained(str(tmp_path / "weights.npz"))
    if changes:  # timm's own standardisation of the same tensors
        ours = vit.model.VisionTransformer(
            **{**read(path).model, "num_classes": 5, "resnet_style": "timm"}
        )
        ours.load_state_dict(read(path).tensors)
    assert difference(ours.eval(), theirs.eval(), size) < TOLERANCE
    assert same_tensors(tmp_path / "weights.npz", ours)
    assert read(tmp_path / "weights.npz").model["num_heads"] == 1


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
    export(tmp_path / "again.safetensors", "timm", tmp_path / "timm")
    export(
        tmp_path / "timm", "safetensors", tmp_path / "converted"
    )  # of another library: a checkpoint for vit.load
    assert difference(vit.load(tmp_path / "converted"), ours, 32) == 0
    assert vit.load(tmp_path / "converted").preprocessing == read(path).preprocessing


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_registers": 2, "global_pool": "mean", "position": "rope2d", "qk_norm": True}],
    ids=["plain", "variants"],
)
def test_onnx(tmp_path, changes):
    onnxruntime = pytest.importorskip("onnxruntime")
    ours, path = checkpoint(tmp_path, **changes)
    assert "differ from PyTorch's by at most" in export(path, "onnx", tmp_path / "vit.onnx")[0]
    session = onnxruntime.InferenceSession(tmp_path / "vit.onnx")
    for batch in (1, 5):  # a dynamic batch
        x = torch.randn(batch, 3, 32, 32)
        with torch.inference_mode():
            assert (
                np.abs(session.run(None, {"images": x.numpy()})[0] - ours(x).numpy()).max()
                < TOLERANCE
            )
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["classes"]) == list("abcde")
    assert json.loads(told["preprocessing"])["image_size"] == [32, 32]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["best.safetensors", "vit.onnx"]


# --- preprocessing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seen",
    [
        Preprocessing((32, 32), 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), None, "bicubic"),
        Preprocessing((32, 32), 3, (0.5,), (0.5,), 0.8, "bilinear"),
    ],
    ids=["squash", "crop"],
)
def test_exported_preprocessing_gives_our_pixels(tmp_path, seen):
    from timm.data import create_transform, resolve_data_config

    _, path = checkpoint(tmp_path)
    source = read(path)
    weights = type(source)(**{**vars(source), "preprocessing": seen, "header": None})
    huggingface.write(weights, tmp_path / "hf")
    timm_format.write(weights, tmp_path / "timm")
    own.write(weights, tmp_path / "own")
    image = picture()
    image.save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        ours = seen(image)
        processor = AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
        assert (processor(image, return_tensors="pt").pixel_values[0] - ours).abs().max() < 1e-5
        theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
        transform = create_transform(**resolve_data_config({}, model=theirs))
        assert (transform(image) - ours).abs().max() < 1e-5
    for name in ("hf", "timm", "own"):
        found = read(tmp_path / name).preprocessing
        assert (found.image_size, found.eval_crop, found.interpolation) == (
            seen.image_size,
            seen.eval_crop,
            seen.interpolation,
        )
        assert torch.equal(found(tmp_path / "x.jpg"), ours)


@pytest.mark.parametrize(
    ("name", "size"), [("vit_b_16", (300, 200)), ("vit_l_16", (211, 300)), ("vit_b_16", (161, 200))]
)
def test_torchvisions_preprocessing(tmp_path, name, size):
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    width = {"vit_b_16": 768, "vit_l_16": 1024}[name]
    theirs = torchvision.models.VisionTransformer(224, 16, 1, width // 64, width, 64)
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    image = picture(size)
    assert (
        read(tmp_path / "x.pth").preprocessing(image) - weights.transforms()(image)
    ).abs().max() < 1e-5


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        ("hf", {"num_registers": 1}, "num_registers=1"),
        ("hf", {"representation_size": 8}, "representation_size=8"),
        ("hf", {"cls_token": False, "global_pool": "mean"}, "global_pool=mean"),
        ("timm", {"representation_size": 8}, "representation_size=8"),
        ("timm", {"layer_norm_eps": 1e-3}, "layer_norm_eps=0.001"),
        ("timm", {"position": "rope2d"}, "position=rope2d"),
        ("torchvision", {"activation": "gelu_tanh"}, "activation=gelu_tanh"),
        ("npz", {"qk_norm": True}, "qk_norm=True"),
        ("torchvision", {"num_channels": 1}, "takes 3 channels"),
        ("npz", {"global_pool": "mean"}, "a class token beside"),
        ("hf", {"pruned_heads": {"0": [1]}, "num_heads": 2}, "pruned_heads"),
    ],
    ids=str,
)
def test_what_a_format_has_no_place_for_is_refused(tmp_path, kind, changes, problem):
    built = {**changes, **({"pruned_heads": {0: [1]}} if "pruned_heads" in changes else {})}
    own_checkpoint(tmp_path / "x", own_model(**built), **changes)
    with pytest.raises(CheckpointError, match=problem):
        export(tmp_path / "x", kind, tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["x"]


def test_onnx_that_is_not_installed(tmp_path, monkeypatch):
    _, path = checkpoint(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name)
    )
    with pytest.raises(
        ConfigError, match="needs onnx; install with: pip install onnx onnxscript onnxruntime"
    ):
        export(path, "onnx", tmp_path / "vit.onnx")


def test_command_line(tmp_path, capsys):
    def command(*arguments: object) -> int:
        return run_command("vit.export", lambda: main([str(argument) for argument in arguments]))

    _, path = checkpoint(tmp_path)
    assert set(FORMATS) == {"hf", "timm", "torchvision", "npz", "safetensors", "onnx"}
    out = tmp_path / "new" / "vit.pth"
    assert command(path, "--format", "torchvision", "--out", out) == 0
    assert "written to" in capsys.readouterr().out
    assert command(path, "--format", "torchvision", "--out", out) == 2
    assert "is there already" in capsys.readouterr().err
    assert command(tmp_path / "no", "--format", "hf", "--out", tmp_path / "hf") == 2
    assert command(path, "--format", "hf", "--out", path / "below") == 2
    assert "can't write there" in capsys.readouterr().err
    assert build(out).head.out_features == 5
