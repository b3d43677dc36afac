import collections
import copy
import math

import pytest
import timm
import timm.optim
import torch

from vit.errors import ConfigError
from vit.model.vision_transformer import VisionTransformer
from vit.training.optimizers import build_optimizer, freeze_all_but_head, parameter_groups
from vit.training.plan import build_schedule, duration_in_steps
from vit.training.state import EMA, load_optimizer_tensors, optimizer_tensors

ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05, "betas": [0.9, 0.99], "eps": 1e-8}
SGD = {"name": "sgd", "lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9, "nesterov": True}
LAMB = {"name": "lamb", "lr": 3e-3, "weight_decay": 0.05, "betas": [0.9, 0.99], "eps": 1e-6}
MUON = {
    "name": "muon",
    "lr": 0.02,
    "adamw_lr": 2e-3,
    "weight_decay": 0.01,
    "betas": [0.9, 0.99],
    "eps": 1e-8,
    "momentum": 0.95,
    "nesterov": True,
}


def model():
    torch.manual_seed(0)
    return VisionTransformer(
        image_size=8, patch_size=4, hidden_size=16, num_layers=2, num_heads=2, num_classes=3
    )


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
    assert {
        "embeddings.cls_token",
        "embeddings.position_embedding",
        "encoder.norm.weight",
        "head.bias",
    } <= set(rest)
    assert {
        "head.weight",
        "embeddings.patch_embedding.projection.weight",
        "encoder.blocks.1.attention.key.weight",
    } <= set(decay)


def references(net, name):
    """The published optimizers on the same groups: a list of them."""
    decay, rest = parameter_groups(
        net, {"adamw": 0.05, "sgd": 5e-4, "lamb": 0.05, "muon": 0.01}[name]
    )
    if name == "adamw":
        return [torch.optim.AdamW([decay, rest], lr=1e-3, betas=(0.9, 0.99))]
    if name == "sgd":
        return [torch.optim.SGD([decay, rest], lr=0.1, momentum=0.9, nesterov=True)]
    if name == "lamb":
        return [
            timm.optim.Lamb([decay, rest], lr=3e-3, betas=(0.9, 0.99), eps=1e-6, max_grad_norm=None)
        ]
    blocks = [
        parameter
        for name, parameter in net.named_parameters()
        if name.startswith("encoder.blocks.") and name.endswith("weight") and "norm" not in name
    ]
    others = [p for p in decay["params"] if all(p is not block for block in blocks)]
    assert len(blocks) == 2 * 6
    assert len(others) == 2
    return [
        torch.optim.Muon(blocks, lr=0.02, weight_decay=0.01, momentum=0.95, nesterov=True),
        torch.optim.AdamW(
            [{"params": others, "weight_decay": 0.01}, rest], lr=2e-3, betas=(0.9, 0.99)
        ),
    ]


@pytest.mark.parametrize(
    "settings", [ADAMW, SGD, LAMB, MUON], ids=lambda settings: settings["name"]
)
def test_optimizers_are_the_published_ones(settings):
    ours, theirs = model().double(), model().double()
    torch.nn.init.normal_(ours.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, **settings)
    others = references(theirs, settings["name"])
    for _ in range(3):
        step(ours, optimizer)
        theirs(torch.ones(2, 3, 8, 8, dtype=torch.float64)).logsumexp(1).sum().backward()
        for other in others:
            other.step()
            other.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_layers_learn_at_the_shares_that_timm_gives_them():
    net = model()
    groups = build_optimizer(net, **ADAMW, layer_decay=0.75).param_groups
    reference = timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3
    )
    theirs = timm.optim.param_groups_layer_decay(
        reference,
        weight_decay=0.05,
        layer_decay=0.75,
        no_weight_decay_list=tuple(reference.no_weight_decay()),
    )

    def counts(groups, rate):
        """{(share of the learning rate, decay): elements}"""
        found = collections.Counter()
        for group in groups:
            found[round(rate(group), 6), group["weight_decay"]] += sum(
                p.numel() for p in group["params"]
            )
        return found

    ours = counts(groups, lambda group: group["initial_lr"] / 1e-3)
    expected = counts(theirs, lambda group: group["lr_scale"])
    expected[0.75, 0.0] -= (
        32  # the last norm, which timm counts to the last block; BEiT and MAE, like us, to the head
    )
    expected[1.0, 0.0] += 32
    assert ours == expected
    assert {group["name"] for group in groups} >= {
        "decay_layer_0",
        "no_decay_layer_1",
        "decay_layer_3",
    }
    assert {group["initial_lr"] for group in build_optimizer(net, **ADAMW).param_groups} == {1e-3}
    muon = {
        group["name"]: group["initial_lr"]
        for group in build_optimizer(net, **MUON, layer_decay=0.5).param_groups
    }
    assert muon["matrices_layer_2"] == pytest.approx(0.01)
    assert muon["decay_layer_3"] == pytest.approx(2e-3)


def test_muon_without_blocks_to_train_is_adamw():
    net = model()
    freeze_all_but_head(net)
    optimizer = build_optimizer(net, **MUON)
    step(net, optimizer)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [2e-3, 2e-3]


@pytest.mark.parametrize(
    "settings", [ADAMW, SGD, LAMB, MUON], ids=lambda settings: settings["name"]
)
def test_saved_optimizer_goes_on_to_the_same_bits(settings):
    net = model()
    optimizer = build_optimizer(net, **settings)
    step(net, optimizer)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(net, optimizer).items()}
    twin = copy.deepcopy(net)
    other = build_optimizer(twin, **settings)
    load_optimizer_tensors(twin, other, saved, "saved")
    for _ in range(2):
        step(net, optimizer)
        step(twin, other)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="adamw, lamb, sgd or muon"):
        build_optimizer(model(), **{**ADAMW, "name": "adagrad"})
    with pytest.raises(ValueError, match="cosine, linear or constant"):
        schedule("step", 10)


def schedule(name, total_steps, warmup=0.0, final=None, cooldown=None, steps_per_epoch=10):
    return build_schedule(
        name=name,
        warmup=warmup,
        final=final,
        cooldown=cooldown,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
    )


def test_schedules():
    cosine = schedule("cosine", 110, warmup=10, final=0.1)
    assert [cosine(0), cosine(5), cosine(10)] == [0.0, 0.5, 1.0]
    assert cosine(60) == pytest.approx(0.55)
    assert cosine(110) == pytest.approx(0.1)
    assert cosine(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    linear = schedule("linear", 100, warmup=0.1)
    assert [linear(5), linear(10), linear(55), linear(100)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
    constant = schedule("constant", 100)
    assert {constant(step) for step in range(101)} == {1.0}


def test_a_constant_rate_cools_down_at_the_end():
    factors = schedule("constant", 100, warmup=10, cooldown=0.2, final=0.5)
    assert [factors(5), factors(10), factors(80)] == [0.5, 1.0, 1.0]
    assert [factors(90), factors(100)] == pytest.approx([0.75, 0.5])


@pytest.mark.parametrize(
    ("value", "steps"), [(0.05, 50), (0, 0), (1, 1), (500, 500), ("5ep", 50), ("0.5ep", 5)]
)
def test_durations_are_shares_steps_or_epochs(value, steps):
    assert duration_in_steps(value, total_steps=1000, steps_per_epoch=10) == steps
    cooled = schedule("constant", 1000, cooldown=value)
    assert next((step for step in range(1001) if cooled(step) < 1), 1001) == 1000 - steps + 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"warmup": 100}, "schedule.warmup of 100 steps leaves nothing of a run of 100"),
        ({"warmup": "10ep"}, "schedule.warmup of 100 steps leaves nothing"),
        (
            {"warmup": 60, "cooldown": 0.5},
            "schedule.warmup of 60 and schedule.cooldown of 50 steps are more than the run's 100",
        ),
        ({"warmup": "5 epochs"}, "a duration is a share of the run .*, got 5 epochs"),
    ],
)
def test_durations_that_do_not_fit_are_refused(arguments, told):
    with pytest.raises(ConfigError, match=told):
        schedule("constant", 100, **arguments)


def test_average_follows_its_formula():
    net = model()
    average = EMA(net, decay=0.5)
    expected = net.head.bias.detach().clone()
    for number in range(12):
        with torch.no_grad():
            net.head.bias += 1
        average.update(net, number)
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * net.head.bias.detach()
    torch.testing.assert_close(average.model.head.bias, expected)
    assert not average.model.head.bias.requires_grad
