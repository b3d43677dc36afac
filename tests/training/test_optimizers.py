"""Parameter groups, and every optimizer against the published one."""

import collections
import copy
from typing import Any

import pytest
import timm
import timm.optim
import torch
from small_training import make_model

from vit.errors import ConfigError
from vit.model.vision_transformer import VisionTransformer
from vit.training.freezing import backbone_of, freeze
from vit.training.muon import Muon, learning_rate_scale
from vit.training.optimizers import (
    OPTIMIZERS,
    Grouping,
    build_optimizer,
    check_optimizer,
    keys_of,
    parameter_groups,
)

ADAMW = {
    "name": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.05,
    "settings": {"betas": [0.9, 0.99], "eps": 1e-8},
}
SGD = {
    "name": "sgd",
    "lr": 0.1,
    "weight_decay": 5e-4,
    "settings": {"momentum": 0.9, "nesterov": True},
}
LAMB = {
    "name": "lamb",
    "lr": 3e-3,
    "weight_decay": 0.05,
    "settings": {"betas": [0.9, 0.99], "eps": 1e-6},
}
MUON = {
    "name": "muon",
    "lr": 0.02,
    "weight_decay": 0.01,
    "settings": {
        "adamw_lr": 2e-3,
        "betas": [0.9, 0.99],
        "eps": 1e-8,
        "momentum": 0.95,
        "nesterov": True,
    },
}
ALL = pytest.mark.parametrize(
    "settings", [ADAMW, SGD, LAMB, MUON], ids=lambda settings: settings["name"]
)


def backward(model):
    images = torch.ones(2, 3, 8, 8, dtype=model.head.weight.dtype)
    model(images).logsumexp(1).sum().backward()


def test_all_optimizers_are_tested():
    assert {settings["name"] for settings in (ADAMW, SGD, LAMB, MUON)} == OPTIMIZERS.keys()


def test_weights_of_layers_decay_and_nothing_else_does():
    model = make_model()
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, Grouping(lr=1.0, weight_decay=0.1))
    assert [(group["role"], group["weight_decay"]) for group in groups] == [
        ("decay", 0.1),
        ("no_decay", 0.0),
    ]
    decayed, rest = ([names[parameter] for parameter in group["params"]] for group in groups)
    assert len(decayed) + len(rest) == len(names)
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed)
    assert {
        "head.weight",
        "embeddings.patch_embedding.projection.weight",
        "encoder.blocks.1.attention.key.weight",
    } <= set(decayed)
    assert {
        "embeddings.cls_token",
        "embeddings.position_embedding",
        "encoder.norm.weight",
        "head.bias",
    } <= set(rest)


def published(model, settings: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """The published optimizers on the same groups."""
    name, lr, weight_decay = (settings[key] for key in ("name", "lr", "weight_decay"))
    groups = parameter_groups(model, Grouping(lr, weight_decay))
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
    betas = (0.9, 0.99)
    if name == "adamw":
        return [torch.optim.AdamW(groups, lr=lr, betas=betas)]
    if name == "sgd":
        return [torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)]
    if name == "lamb":
        return [timm.optim.Lamb(groups, lr=lr, betas=betas, eps=1e-6, max_grad_norm=None)]

    assert name == "muon"
    decayed, rest = groups
    matrices = [
        parameter
        for name, parameter in model.named_parameters()
        if name.startswith("encoder.blocks.") and name.endswith("weight") and "norm" not in name
    ]
    others = [item for item in decayed["params"] if all(item is not matrix for matrix in matrices)]
    assert len(matrices) == 2 * 6
    assert len(others) == 2
    groups = [{"params": others, "weight_decay": weight_decay}, rest]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, momentum=0.95, nesterov=True),
        torch.optim.AdamW(groups, lr=2e-3, betas=betas),
    ]


@ALL
def test_optimizers_are_the_published_ones(settings, monkeypatch):
    # PyTorch's Muon multiplies in bfloat16 on every CPU; these matrices are tiny
    monkeypatch.setattr("vit.training.muon.cpu_multiplies_bf16", lambda: True)
    ours = make_model(torch.float64)
    torch.nn.init.normal_(ours.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    theirs = make_model(torch.float64)
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, **settings)
    references = published(theirs, settings)
    for _ in range(3):
        for model, optimizers in ((ours, [optimizer]), (theirs, references)):
            backward(model)
            for item in optimizers:
                item.step()
                item.zero_grad()
    # A batch of products in bfloat16 may round an element to the other neighbor, 0.4 % away
    tolerance = {"rtol": 0, "atol": 1e-4} if settings is MUON else {}
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def elements_by_rate(groups, rate) -> collections.Counter:
    """{(fraction of the learning rate, weight decay): elements}."""
    elements = collections.Counter()
    for group in groups:
        key = round(rate(group), 6), group["weight_decay"]
        elements[key] += sum(parameter.numel() for parameter in group["params"])
    return elements


def test_layers_learn_at_the_rates_that_timm_gives_them():
    groups = build_optimizer(make_model(), **ADAMW, layer_decay=0.75).param_groups
    reference = timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3
    )
    theirs = timm.optim.param_groups_layer_decay(
        reference,
        weight_decay=0.05,
        layer_decay=0.75,
        no_weight_decay_list=tuple(reference.no_weight_decay()),
    )
    expected = elements_by_rate(theirs, lambda group: group["lr_scale"])
    # timm counts the last norm to the last block; BEiT and MAE, like us, to the head
    last_norm = 32
    expected[0.75, 0.0] -= last_norm
    expected[1.0, 0.0] += last_norm
    assert elements_by_rate(groups, lambda group: group["initial_lr"] / 1e-3) == expected
    names = {group["name"] for group in groups}
    assert names >= {"decay_layer_0", "no_decay_layer_1", "decay_layer_3"}


def test_without_layer_decay_all_layers_learn_alike():
    groups = build_optimizer(make_model(), **ADAMW).param_groups
    assert {group["initial_lr"] for group in groups} == {1e-3}


STEM = {"conv_stem": [16, 32, 16], "conv_stem_strides": [2, 1, 1]}
STEM_KERNEL = "embeddings.patch_embedding.stem.layers.{}.conv.weight"


@pytest.mark.parametrize(
    ("settings", "kernels"),
    [({}, set()), (STEM, {1, 2}), ({"resnet_stages": [1]}, set())],
    ids=["plain", "conv_stem", "resnet"],
)
def test_muon_gets_the_maps_from_hidden_states_to_hidden_states(settings, kernels):
    model = make_model(**settings)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, **MUON, layer_decay=0.5).param_groups
    depths = {
        names[parameter]: group["name"].rpartition("_")[2]
        for group in groups
        if group["role"] == "matrices"
        for parameter in group["params"]
    }
    of_blocks = {name for name in depths if name.startswith("encoder.blocks.")}
    assert len(of_blocks) == 2 * 6
    assert depths.keys() - of_blocks == {STEM_KERNEL.format(number) for number in kernels}
    # The stem belongs to the embeddings
    assert {depths[name] for name in depths.keys() - of_blocks} <= {"0"}
    assert sum(len(group["params"]) for group in groups) == len(names)


@pytest.mark.parametrize("shape", [(32, 16, 3, 3), (64, 2, 3, 3), (5, 5, 1, 1)], ids=str)
def test_a_kernel_is_to_muon_the_matrix_it_is_for_a_patch(shape):
    generator = torch.Generator().manual_seed(0)
    kernels = [torch.randn(shape, generator=generator).requires_grad_() for _ in range(2)]
    matrices = [kernel.detach().flatten(1).clone().requires_grad_() for kernel in kernels]
    settings = {"lr": 0.02, "weight_decay": 0.1, "newton_schulz": "fp32"}
    optimizers = [Muon([{"params": params}], **settings) for params in (kernels, matrices)]
    start = kernels[0].detach().clone()
    for _ in range(3):
        for kernel, matrix in zip(kernels, matrices, strict=True):
            kernel.grad = torch.randn(shape, generator=generator)
            matrix.grad = kernel.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    for kernel, matrix in zip(kernels, matrices, strict=True):
        assert torch.equal(kernel.flatten(1), matrix)
    assert not torch.allclose(kernels[0], start)
    # The rate of a tall matrix is scaled by the shape of the matrix
    rows, columns = matrices[0].shape
    scale = learning_rate_scale(kernels[0].shape)
    assert scale == pytest.approx(max(1, rows / columns) ** 0.5)


def test_layer_decay_applies_to_both_rates_of_muon():
    groups = build_optimizer(make_model(), **MUON, layer_decay=0.5).param_groups
    rates = {group["name"]: group["initial_lr"] for group in groups}
    assert rates["matrices_layer_2"] == pytest.approx(0.01)
    assert rates["decay_layer_3"] == pytest.approx(2e-3)


def test_muon_without_blocks_to_train_is_adamw():
    model = make_model()
    freeze(backbone_of(model))
    optimizer = build_optimizer(model, **MUON)
    backward(model)
    optimizer.step()
    assert [group["initial_lr"] for group in optimizer.param_groups] == [2e-3, 2e-3]
    changed = [item for group in optimizer.param_groups for item in group["params"]]
    assert {id(item) for item in changed} == {id(item) for item in model.head.parameters()}


def test_both_heads_of_a_distilled_model_are_probed():
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 1}
    model = VisionTransformer(**sizes, num_classes=2, distill_token=True)
    freeze(backbone_of(model))
    trained = {name for name, item in model.named_parameters() if item.requires_grad}
    assert trained == {
        f"{head}.{part}" for head in ("head", "head_distill") for part in ("weight", "bias")
    }


@ALL
def test_a_whole_optimizer_is_restored_by_torchs_own_state_dict(settings):
    model = make_model()
    optimizer = build_optimizer(model, **settings)
    backward(model)
    optimizer.step()
    twin = make_model()
    twin.load_state_dict(model.state_dict())
    other = build_optimizer(twin, **settings)
    # A copy, since torch would let both share the tensors
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, item in ((model, optimizer), (twin, other)):
        item.zero_grad()
        backward(net)
        item.step()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_unknown_names_and_keys_of_others_are_refused():
    with pytest.raises(ConfigError, match=r"optimizer\.name must be one of adamw.* got adagrad"):
        build_optimizer(make_model(), **{**ADAMW, "name": "adagrad"})
    with pytest.raises(ConfigError, match=r"optimizer\.momentum .*optimizer=adamw.* muon, sgd"):
        check_optimizer("adamw", {"momentum": 0.9})
    with pytest.raises(ConfigError, match=r"optimizer\.adamw_lr .*optimizer=sgd.* muon"):
        check_optimizer("sgd", {"adamw_lr": 1e-3})
    # null is "not given"
    check_optimizer("adamw", {"momentum": None, "betas": [0.9, 0.99]})
    assert keys_of(OPTIMIZERS["sgd"]) == ["momentum", "nesterov"]


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_nesterov_needs_momentum(name):
    settings = {"nesterov": True, "momentum": 0.0}
    with pytest.raises(ConfigError, match=r"optimizer\.nesterov.*optimizer\.momentum"):
        build_optimizer(make_model(), name=name, lr=0.1, weight_decay=0.0, settings=settings)
