"""Weights of other libraries: loaded here they must give the logits they give there. No file of theirs is needed: their
models are built with random weights and saved in their own formats."""

import json
import os
import pickle
import random

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from vit.checkpoints.file import write_checkpoint
from vit.config.resume import TRAVELS
from vit.data.preprocessing import Preprocessing
from vit.errors import CheckpointError
from vit.model.vision_transformer import Block, VisionTransformer
from vit.weights.loading import build, load_into, read

SIZES = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12)}
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small models are faster by one thread, tenfold where other processes share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shaken(model: nn.Module) -> nn.Module:
    """Every parameter random, so that none stands in for another by being zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = (
                0.2 if "pos" in name or "token" in name else 0.02 if parameter.dim() > 1 else 0.1
            )
            if (
                "fc1" in name or "mlp.0" in name
            ):  # far enough from 0 for the kinds of GELU to differ
                spread = 2 / parameter.shape[-1] ** 0.5
            is_scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + is_scale)
    return model.eval()


def images(size: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))


def difference(ours: nn.Module, theirs: nn.Module, size: int = 64) -> float:
    x = images(size)
    with torch.inference_mode():
        there = theirs(x)
        return (ours(x) - (there.logits if hasattr(there, "logits") else there)).abs().max().item()


def hf_model(size: str = "Ti", patch: int = 16, kind=ViTForImageClassification, **changes):
    width, heads = SIZES[size]
    config = dict(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=64,
        patch_size=patch,
    )
    changes = changes if "id2label" in changes else {"num_labels": 5, **changes}
    return shaken(kind(ViTConfig(**{**config, **changes})))


def timm_model(name: str = "vit_tiny_patch16_224", **changes) -> nn.Module:
    return shaken(
        timm.create_model(name, **{"depth": 2, "num_classes": 5, "img_size": 64, **changes})
    )


def torchvision_model(
    size: str = "Ti", patch: int = 16, representation_size: int | None = None
) -> nn.Module:
    width, heads = SIZES[size]
    return shaken(
        torchvision.models.VisionTransformer(
            64,
            patch,
            2,
            heads,
            width,
            4 * width,
            num_classes=5,
            representation_size=representation_size,
        )
    )


def own_model(**changes) -> VisionTransformer:
    arguments = dict(
        image_size=32, patch_size=8, hidden_size=64, num_layers=2, num_heads=1, num_classes=5
    )
    return shaken(VisionTransformer(**{**arguments, **changes}))  # pyright: ignore


def jax_arrays(model: VisionTransformer, big_vision: bool = False) -> dict[str, np.ndarray]:
    """Our tensors under Google's published names and shapes, written out independently of vit/weights/npz.py."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    attention, mlp, norm = ("0", "0", "1") if big_vision else ("1", "3", "2")
    heads = len(model.encoder.blocks[0].attention.heads)
    arrays = {
        "embedding/kernel": state["embeddings.patch_embedding.projection.weight"].transpose(
            2, 3, 1, 0
        ),
        "embedding/bias": state["embeddings.patch_embedding.projection.bias"],
        "Transformer/encoder_norm/scale": state["encoder.norm.weight"],
        "Transformer/encoder_norm/bias": state["encoder.norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    if "embeddings.cls_token" in state:
        arrays["cls"] = state["embeddings.cls_token"]
    if "embeddings.position_embedding" in state:
        place = "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"
        arrays[place] = state["embeddings.position_embedding"]
    if "pooler.dense.weight" in state:
        arrays |= {
            "pre_logits/kernel": state["pooler.dense.weight"].T,
            "pre_logits/bias": state["pooler.dense.bias"],
        }
    for i in range(len(model.encoder.blocks)):
        ours, theirs = f"encoder.blocks.{i}.", f"Transformer/encoderblock_{i}/"
        for part in ("query", "key", "value"):
            weight = state[f"{ours}attention.{part}.weight"]
            head = f"{theirs}MultiHeadDotProductAttention_{attention}/{part}/"
            arrays[head + "kernel"] = weight.T.reshape(len(weight), heads, -1)
            arrays[head + "bias"] = state[f"{ours}attention.{part}.bias"].reshape(heads, -1)
        out = f"{theirs}MultiHeadDotProductAttention_{attention}/out/"
        arrays[out + "kernel"] = state[ours + "attention.projection.weight"].T.reshape(
            heads, -1, len(weight)
        )
        arrays[out + "bias"] = state[ours + "attention.projection.bias"]
        for number, layer in enumerate(("fc1", "fc2")):
            arrays[f"{theirs}MlpBlock_{mlp}/Dense_{number}/kernel"] = state[
                f"{ours}mlp.{layer}.weight"
            ].T
            arrays[f"{theirs}MlpBlock_{mlp}/Dense_{number}/bias"] = state[f"{ours}mlp.{layer}.bias"]
        for number, layer in (("0", "norm1"), (norm, "norm2")):
            arrays[f"{theirs}LayerNorm_{number}/scale"] = state[f"{ours}{layer}.weight"]
            arrays[f"{theirs}LayerNorm_{number}/bias"] = state[f"{ours}{layer}.bias"]
    if model.embeddings.patch_embedding.stem is not None:
        arrays |= jax_stem(state, [3, 4, 9])
    return arrays


def jax_stem(state: dict[str, np.ndarray], stages: list[int]) -> dict[str, np.ndarray]:
    stem = "embeddings.patch_embedding.stem."
    arrays = {
        "conv_root/kernel": state[stem + "conv.weight"].transpose(2, 3, 1, 0),
        "gn_root/scale": state[stem + "norm.weight"].reshape(1, 1, 1, -1),
        "gn_root/bias": state[stem + "norm.bias"].reshape(1, 1, 1, -1),
    }
    number = 0
    for stage, units in enumerate(stages, start=1):
        for unit in range(1, units + 1):
            ours, theirs = f"{stem}blocks.{number}.", f"block{stage}/unit{unit}/"
            names = {f"conv{i}": (f"conv{i}", f"gn{i}", f"norm{i}") for i in (1, 2, 3)}
            if ours + "downsample.0.weight" in state:
                names["downsample.0"] = ("conv_proj", "gn_proj", "downsample.1")
            for conv, (their_conv, their_norm, norm) in names.items():
                arrays[f"{theirs}{their_conv}/kernel"] = state[f"{ours}{conv}.weight"].transpose(
                    2, 3, 1, 0
                )
                arrays[f"{theirs}{their_norm}/scale"] = state[f"{ours}{norm}.weight"].reshape(
                    1, 1, 1, -1
                )
                arrays[f"{theirs}{their_norm}/bias"] = state[f"{ours}{norm}.bias"].reshape(
                    1, 1, 1, -1
                )
            number += 1
    return arrays


# --- the same logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [16, 32])
@pytest.mark.parametrize("size", SIZES)
def test_hugging_face(tmp_path, size, patch):
    theirs = hf_model(size, patch)
    theirs.save_pretrained(tmp_path)
    ours = VisionTransformer.load_from(tmp_path)
    assert difference(ours, theirs) < TOLERANCE
    assert ours.encoder.norm.eps == 1e-12


def test_hugging_faces_names_of_today_and_its_settings(tmp_path):
    theirs = hf_model(
        hidden_act="gelu_new", layer_norm_eps=1e-3, qkv_bias=False, id2label={0: "cat", 1: "dog"}
    )
    theirs.save_pretrained(tmp_path)
    save_file(
        theirs.state_dict(), tmp_path / "model.safetensors"
    )  # save_pretrained writes the older names
    assert "vit.layers.0.attention.q_proj.weight" in load_file(tmp_path / "model.safetensors")
    ours = build(tmp_path)
    assert difference(ours, theirs) < TOLERANCE
    assert ours.classes == ["cat", "dog"]
    assert ours.encoder.blocks[0].attention.query.bias is None


def test_hugging_face_with_a_pooler(tmp_path):
    theirs = hf_model(kind=ViTModel, pooler_output_size=48)
    theirs.save_pretrained(tmp_path)
    ours = build(tmp_path, num_classes=3)
    with torch.inference_mode():
        trace, there = ours.trace(images()), theirs(images())
    assert (trace.pooled - there.pooler_output).abs().max() < TOLERANCE
    assert not trace.logits.any()  # a fresh head is zero
    with pytest.raises(CheckpointError, match="holds no head; give num_classes"):
        build(tmp_path)


@pytest.mark.parametrize("patch", [16, 32])
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_timm(tmp_path, size, patch):
    theirs = timm_model(f"vit_{size}_patch16_224", patch_size=patch)
    save_file(theirs.state_dict(), tmp_path / "some.name")
    assert difference(build(tmp_path / "some.name"), theirs) < TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"reg_tokens": 4},
        {"reg_tokens": 4, "no_embed_class": True},
        {"no_embed_class": True, "init_values": 0.1},
        {"qk_norm": True, "num_heads": 6},
        {"qkv_bias": False},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
    ],
    ids=str,
)
def test_timms_variants(tmp_path, changes):
    theirs = timm_model(**changes)
    torch.save(
        {"state_dict": {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}},
        tmp_path / "x.pth",
    )
    assert difference(build(tmp_path / "x.pth"), theirs) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "stages"),
    [("vit_small_r26_s32_224", [2, 2, 2, 2]), ("vit_base_r50_s16_224", [3, 4, 9])],
)
def test_timms_hybrids(tmp_path, name, stages):
    theirs = timm_model(name, depth=1)
    save_file(theirs.state_dict(), tmp_path / "x")
    ours = build(tmp_path / "x")
    assert read(tmp_path / "x").model["resnet_stages"] == stages
    assert difference(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("representation_size", [None, 48])
@pytest.mark.parametrize("patch", [16, 32])
@pytest.mark.parametrize("size", SIZES)
def test_torchvision(tmp_path, size, patch, representation_size):
    theirs = torchvision_model(size, patch, representation_size)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    assert difference(build(tmp_path / "vit.pth"), theirs) < TOLERANCE


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_jeonsworld(tmp_path, legacy):
    ours, block = own_model(), "transformer.encoder.layer."
    renames = [
        ("embeddings.patch_embedding.projection.", "transformer.embeddings.patch_embeddings."),
        ("embeddings.position_embedding", "transformer.embeddings.position_embeddings"),
        ("embeddings.cls_token", "transformer.embeddings.cls_token"),
        ("encoder.norm.", "transformer.encoder.encoder_norm."),
        ("encoder.blocks.", block),
        (".attention.projection", ".attn.out"),
        (".attention.", ".attn."),
        (".norm1.", ".attention_norm."),
        (".norm2.", ".ffn_norm."),
        (".mlp.", ".ffn."),
    ]
    theirs = {}
    for name, tensor in ours.state_dict().items():
        for a, b in renames:
            name = (
                name.replace(a, b)
                if a not in ("encoder.blocks.", "encoder.norm.") or name.startswith(a)
                else name
            )
        theirs[name] = tensor
    torch.save(theirs, tmp_path / "cifar10.bin", _use_new_zipfile_serialization=not legacy)
    loaded = build(tmp_path / "cifar10.bin")
    assert difference(loaded, ours, 32) == 0
    theirs["transformer.embeddings.hybrid_model.root.conv.weight"] = torch.zeros(1)
    torch.save(theirs, tmp_path / "hybrid.bin")
    with pytest.raises(CheckpointError, match="hybrid of ViT-pytorch"):
        read(tmp_path / "hybrid.bin")


@pytest.mark.parametrize("patch", [16, 32])
@pytest.mark.parametrize("size", SIZES)
def test_npz_as_timm_loads_it(tmp_path, size, patch):
    width, heads = SIZES[size]
    ours = own_model(
        image_size=64, patch_size=patch, hidden_size=width, num_heads=heads, activation="gelu_tanh"
    )
    np.savez(tmp_path / "weights.npz", **jax_arrays(ours))
    theirs = timm_model(
        "vit_base_patch16_224",
        patch_size=patch,
        embed_dim=width,
        num_heads=heads,
        act_layer="gelu_tanh",
    )
    theirs.load_pretrained(str(tmp_path / "weights.npz"))
    loaded = build(tmp_path / "weights.npz")
    assert all(
        torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in ours.state_dict().items()
    )
    assert difference(loaded, theirs) < TOLERANCE


def test_npz_hybrid_as_timm_loads_it(tmp_path):
    ours = own_model(
        image_size=64,
        patch_size=16,
        resnet_stages=[3, 4, 9],
        hidden_size=192,
        num_heads=3,
        num_layers=1,
    )
    np.savez(tmp_path / "hybrid.npz", **jax_arrays(ours))
    theirs = timm_model(
        "vit_base_r50_s16_224", depth=1, embed_dim=192, num_heads=3, act_layer="gelu_tanh"
    )
    theirs.load_pretrained(str(tmp_path / "hybrid.npz"))
    weights = read(tmp_path / "hybrid.npz")
    assert weights.model["resnet_style"] == "jax"
    loaded = VisionTransformer(**{**weights.model, "resnet_style": "timm"})
    report = load_into(loaded, weights)
    assert "trained with resnet_style=jax, the model has the other" in report.notes
    assert difference(loaded.eval(), theirs) < TOLERANCE


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
def test_big_visions_npz(tmp_path, prefix):
    ours = own_model(
        cls_token=False,
        global_pool="mean",
        position="sincos2d",
        representation_size=64,
        image_size=224,
        patch_size=56,
        activation="gelu_tanh",
    )
    arrays = {prefix + name: array for name, array in jax_arrays(ours, big_vision=True).items()}
    np.savez(tmp_path / "s16.npz", **arrays)
    assert difference(build(tmp_path / "s16.npz"), ours, 224) == 0
    arrays[prefix + "MAPHead_0/probe"] = np.zeros((1, 1, 64), np.float32)
    np.savez(tmp_path / "map.npz", **arrays)
    with pytest.raises(CheckpointError, match="pools by attention"):
        read(tmp_path / "map.npz")


def test_big_visions_stacked_blocks_and_folded_cls_position(tmp_path):
    ours = own_model(cls_position=False, activation="gelu_tanh")
    arrays = jax_arrays(ours, big_vision=True)
    for name in [name for name in arrays if "encoderblock_0" in name]:
        stack = np.stack([arrays.pop(name), arrays.pop(name.replace("_0/", "_1/", 1))])
        arrays[name.replace("encoderblock_0", "encoderblock")] = stack
    np.savez(tmp_path / "a.npz", **arrays)
    assert difference(build(tmp_path / "a.npz"), ours, 32) == 0
    position = np.full(
        (1, 1, 64), 0.25, np.float32
    )  # the older files: added to the token when loading, as big_vision does
    arrays |= {
        "cls": arrays["cls"] - position,
        "pos_embedding": np.concatenate([position, arrays["pos_embedding"]], axis=1),
    }
    np.savez(tmp_path / "b.npz", **arrays)
    assert difference(build(tmp_path / "b.npz"), ours, 32) < TOLERANCE


def test_bfloat16_in_an_npz(tmp_path):
    ours = own_model(activation="gelu_tanh").bfloat16()
    arrays = jax_arrays(ours.float())
    kernel = (
        torch.from_numpy(np.ascontiguousarray(arrays["head/kernel"]))
        .bfloat16()
        .view(torch.int16)
        .numpy()
    )
    arrays["head/kernel"] = kernel.view("V2")  # as numpy reads jax's
    np.savez(tmp_path / "x.npz", **arrays)
    assert difference(build(tmp_path / "x.npz"), ours, 32) == 0


def own_checkpoint(path, model, kind="best", **config):
    header = {
        "kind": kind,
        "config": {
            "model": {
                "name": "x",
                "image_size": 32,
                "patch_size": 8,
                "hidden_size": 64,
                "num_layers": 2,
                "num_heads": 1,
                **config,
            }
        },
        "classes": list("abcde"),
        "precision": "fp32",
        "preprocessing": Preprocessing((32, 32), 3, (0.5,), (0.5,), None, "bilinear").to_dict(),
    }
    tensors = model.state_dict()
    if kind == "last":
        tensors = {
            f"{prefix}/{name}": tensor * factor
            for name, tensor in tensors.items()
            for prefix, factor in (("average", 1), ("model", 2))
        }
    write_checkpoint(path, tensors, header)


@pytest.mark.parametrize("kind", ["best", "last"])
def test_our_own(tmp_path, kind):
    ours = own_model(position="rope2d", num_registers=2)
    own_checkpoint(tmp_path / "best.safetensors", ours, kind, position="rope2d", num_registers=2)
    loaded = build(tmp_path)
    assert loaded.classes == list("abcde")
    assert loaded.preprocessing.image_size == (32, 32)
    assert difference(loaded, ours, 32) == 0
    save_file(own_model().state_dict(), tmp_path / "bare")
    assert difference(build(tmp_path / "bare"), own_model(), 32) == 0


def test_our_own_with_removed_heads(tmp_path):
    ours = own_model(num_heads=4, pruned_heads={1: [0, 2]})
    own_checkpoint(tmp_path / "x", ours, num_heads=4, pruned_heads={"1": [0, 2]})
    assert difference(build(tmp_path / "x"), ours, 32) == 0


def test_one_block_alone(tmp_path):
    theirs = timm_model()
    save_file(theirs.state_dict(), tmp_path / "x")
    block, x = Block(192, 3, 768).eval(), torch.randn(2, 7, 192)
    block.load_from(read(tmp_path / "x").tensors, 1)
    with torch.inference_mode():
        assert (block(x) - theirs.blocks[1](x)).abs().max() < TOLERANCE
    with pytest.raises(CheckpointError, match="block 2: weights of another model"):
        block.load_from(read(tmp_path / "x").tensors, 2)


# --- fitting them to a model -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """(path of timm weights at 64 px with 5 classes, their state_dict)."""
    state = timm_model().state_dict()
    save_file(state, tmp_path / "timm")
    return tmp_path / "timm", state


def tiny(**changes) -> VisionTransformer:
    arguments = dict(
        image_size=64, patch_size=16, hidden_size=192, num_layers=2, num_heads=3, num_classes=5
    )
    return VisionTransformer(**{**arguments, **changes})  # pyright: ignore


def test_report_of_resized_fresh_and_left_over(saved):
    model = tiny(image_size=96, num_channels=1, num_classes=7, layer_norm_eps=1e-5)
    report = load_into(model, read(saved[0]))
    assert report.fresh == ["head.weight", "head.bias"] == report.left_over
    assert not model.head.weight.any()
    kernel = saved[1]["patch_embed.proj.weight"].sum(dim=1, keepdim=True)
    assert torch.equal(model.embeddings.patch_embedding.projection.weight, kernel)
    reference = timm.layers.resample_abs_pos_embed(
        saved[1]["pos_embed"], [6, 6], num_prefix_tokens=1
    )
    assert torch.allclose(model.embeddings.position_embedding, reference, atol=1e-6)
    text = str(report)
    assert "position_embedding from 4x4 to 6x6" in text
    assert "from 3 to 1 channels" in text
    assert "freshly initialised: head.weight, head.bias" in text
    assert "num_heads=3 is assumed" in text
    assert "trained with layer_norm_eps=1e-06, the model's is 1e-05" in text


def test_a_class_tokens_position_comes_and_goes(saved):
    theirs = timm_model()
    without = tiny(cls_position=False)
    load_into(without, read(saved[0]))
    assert difference(without.eval(), theirs) < TOLERANCE
    theirs = timm_model(no_embed_class=True)
    save_file(theirs.state_dict(), saved[0])
    model = tiny()
    load_into(model, read(saved[0]))
    assert difference(model.eval(), theirs) < TOLERANCE


def test_a_head_of_other_classes_is_fresh(tmp_path):
    theirs = hf_model(id2label={0: "cat", 1: "dog"})
    theirs.save_pretrained(tmp_path)
    model = tiny(num_classes=2)
    assert load_into(model, read(tmp_path), ["cat", "dog"]).fresh == []
    assert load_into(model, read(tmp_path), ["dog", "cat"]).fresh == ["head.weight", "head.bias"]


def test_a_pooler_is_left_out_with_the_head_only(tmp_path):
    torch.save(torchvision_model(representation_size=48).state_dict(), tmp_path / "x.pth")
    weights = read(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="pooler"):
        load_into(tiny(), weights)
    report = load_into(tiny(num_classes=3), weights)
    assert report.left_over == [
        "head.weight",
        "head.bias",
        "pooler.dense.weight",
        "pooler.dense.bias",
    ]
    report = load_into(tiny(num_classes=3, representation_size=48), weights)
    assert report.fresh == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_layers": 3}, "num_layers 2 there, 3 in the model"),
        ({"hidden_size": 384}, "hidden_size 192 there, 384 in the model"),
        (
            {"patch_size": 32},
            r"projection.weight is \(192, 3, 16, 16\), the model's \(192, 3, 32, 32\)",
        ),
        ({"num_registers": 1}, "embeddings.registers is missing"),
        ({"qkv_bias": False}, "query.bias has no place in the model"),
    ],
    ids=str,
)
def test_another_model_is_refused_and_left_alone(saved, changes, expected):
    model = tiny(**changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=expected):
        load_into(model, read(saved[0]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_heads_that_the_file_tells_must_agree(tmp_path):
    np.savez(tmp_path / "x.npz", **jax_arrays(own_model(hidden_size=192, num_heads=6)))
    with pytest.raises(CheckpointError, match="num_heads 6 there, 3 in the model"):
        load_into(tiny(image_size=32, patch_size=8), read(tmp_path / "x.npz"))


# --- preprocessing ---------------------------------------------------------------------------------------------------


def test_preprocessing_travels(tmp_path):
    hf_model().save_pretrained(tmp_path)
    assert read(tmp_path).preprocessing == Preprocessing(
        (64, 64), 3, (0.5,) * 3, (0.5,) * 3, None, "bilinear"
    )
    config = {
        "size": {"shortest_edge": 80},
        "crop_size": {"height": 64, "width": 64},
        "do_center_crop": True,
        "resample": 3,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [1, 2, 3],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert read(tmp_path).preprocessing == Preprocessing(
        (64, 64), 3, (0.1, 0.2, 0.3), (1, 2, 3), 0.8, "bicubic"
    )
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json: not readable as JSON"):
        read(tmp_path)

    folder = tmp_path / "timm"
    timm.models.save_for_hf(timm_model(), folder, safe_serialization=True)
    assert read(folder).preprocessing == Preprocessing(
        (64, 64), 3, (0.5,) * 3, (0.5,) * 3, 0.9, "bicubic"
    )
    assert read(folder / "model.safetensors").preprocessing is not None
    save_file(timm_model().state_dict(), tmp_path / "bare")
    assert read(tmp_path / "bare").preprocessing is None


# --- bad input -------------------------------------------------------------------------------------------------------


def refused(path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_no_known_format(tmp_path):
    (tmp_path / "x").write_bytes(random.Random(0).randbytes(1000))
    refused(
        tmp_path / "x",
        "no known format of weights; looked for Google's .npz, safetensors, PyTorch's",
    )
    (tmp_path / "x").write_bytes(b"")
    refused(tmp_path / "x", "no known format")
    refused(tmp_path / "missing", "no readable file")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "a folder without weights; looked for model.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "x")
    refused(tmp_path / "x", "tensors of no known kind")
    torch.save([1, 2], tmp_path / "x")
    refused(tmp_path / "x", "not of a state_dict")
    np.savez(tmp_path / "x.npz", a=np.zeros(1))
    refused(tmp_path / "x.npz", "tensors of no known kind")


@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["npz", "safetensors", "zip", "legacy", "own"])
def test_truncated(tmp_path, kind, share):
    model, path = own_model(), tmp_path / "x"
    if kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, **jax_arrays(model))
    elif kind == "safetensors":
        save_file(model.state_dict(), path)
    elif kind == "own":
        own_checkpoint(path, model)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    os.truncate(path, int(path.stat().st_size * share))
    refused(path, "cut short or damaged|not a whole")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "npz"])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, kind):
    path, canary = tmp_path / "x.bin", tmp_path / "canary"
    held = {"head.weight": torch.zeros(1), "x": Canary(canary)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(held))
    elif kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, **{"embedding/kernel": np.array([Canary(canary)], dtype=object)})
    else:
        torch.save(held, path, _use_new_zipfile_serialization=kind == "zip")
    refused(
        path, "refused, for it holds more than tensors" if kind in ("zip", "legacy") else "x.bin: "
    )
    assert not canary.exists()
    if kind == "pickle":  # the canary does sing where it is let
        pickle.loads(path.read_bytes())
        assert canary.exists()


def test_unknown_and_missing_names_are_listed(tmp_path):
    state = timm_model().state_dict()
    save_file(
        state | {"dist_token": torch.zeros(1), "norm_pre.weight": torch.zeros(1)}, tmp_path / "x"
    )
    refused(tmp_path / "x", "no part for dist_token, norm_pre.weight")
    state.pop("blocks.1.mlp.fc2.bias")
    save_file(state, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"encoder.blocks.1.mlp.fc2.bias is missing"):
        build(tmp_path / "x")
    save_file(timm_model(global_pool="avg").state_dict(), tmp_path / "x")
    refused(tmp_path / "x", "fc_norm take the mean before the norm")
    assert set(TRAVELS) <= own_arguments()


def own_arguments() -> set[str]:
    return set(VisionTransformer.__init__.__kwdefaults__)
