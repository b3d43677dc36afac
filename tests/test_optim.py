import copy
import math

import pytest
import torch

from vit.model import VisionTransformer
from vit.optim import (
    WeightAverage,
    build_optimizer,
    build_schedule,
    load_optimizer_tensors,
    optimizer_tensors,
    parameter_groups,
)

ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05, "betas": [0.9, 0.99], "eps": 1e-8, "momentum": None,
         "nesterov": None}
SGD = {"name": "sgd", "lr": 0.1, "weight_decay": 5e-4, "betas": None, "eps": None, "momentum": 0.9, "nesterov": True}


def model():
    torch.manual_seed(0)
    return VisionTransformer(image_size=8, patch_size=4, hidden_size=16, num_layers=2, num_heads=2, num_classes=3)


def step(net, optimizer):
    net(torch.ones(2, 3, 8, 8, dtype=net.head.weight.dtype)).logsumexp(1).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_weights_of_layers_decay_and_nothing_else_does():
    net = model()
    names = {parameter: name for name, parameter in net.named_parameters()}
    decay, rest = ([names[p] for p in group["params"]] for group in parameter_groups(net, 0.1))
    assert len(decay) + len(rest) == len(names)
    assert all(name.endswith(".weight") and "norm" not in name for name in decay)
    assert {"embeddings.cls_token", "embeddings.position_embedding", "encoder.norm.weight", "head.bias"} <= set(rest)
    assert {"head.weight", "embeddings.patch_embedding.projection.weight",
            "encoder.blocks.1.attention.key.weight"} <= set(decay)


@pytest.mark.parametrize("settings", [ADAMW, SGD])
def test_optimizers_are_torchs(settings):
    ours, theirs = model().double(), model().double()
    optimizer = build_optimizer(ours, **settings)
    groups = parameter_groups(theirs, settings["weight_decay"])
    if settings is ADAMW:
        reference = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    else:
        reference = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(3):
        step(ours, optimizer)
        step(theirs, reference)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("settings", [ADAMW, SGD])
def test_saved_optimizer_goes_on_to_the_same_bits(settings):
    net = model()
    optimizer = build_optimizer(net, **settings)
    step(net, optimizer)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(net, optimizer).items()}
    twin = copy.deepcopy(net)
    other = build_optimizer(twin, **settings)
    load_optimizer_tensors(twin, other, saved)
    for _ in range(2):
        step(net, optimizer)
        step(twin, other)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="adamw or sgd"):
        build_optimizer(model(), **{**ADAMW, "name": "adagrad"})
    with pytest.raises(ValueError, match="cosine, linear or constant"):
        build_schedule(name="step", warmup=0, final=None, total_steps=10)


def test_schedules():
    cosine = build_schedule(name="cosine", warmup=10, final=0.1, total_steps=110)
    assert [cosine(0), cosine(5), cosine(10)] == [0.0, 0.5, 1.0]
    assert cosine(60) == pytest.approx(0.55)
    assert cosine(110) == pytest.approx(0.1)
    assert cosine(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    linear = build_schedule(name="linear", warmup=0.1, final=None, total_steps=100)
    assert [linear(5), linear(10), linear(55), linear(100)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
    constant = build_schedule(name="constant", warmup=0.0, final=None, total_steps=100)
    assert {constant(step) for step in range(101)} == {1.0}
    with pytest.raises(ValueError, match="warmup of 100 steps"):
        build_schedule(name="cosine", warmup=100, final=None, total_steps=100)


def test_average_follows_its_formula():
    net = model()
    average = WeightAverage(net, decay=0.5)
    expected = net.head.bias.detach().clone()
    for number in range(12):
        with torch.no_grad():
            net.head.bias += 1
        average.update(net, number)
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * net.head.bias.detach()
    torch.testing.assert_close(average.model.head.bias, expected)
    assert not average.model.head.bias.requires_grad
