"""What training asks of a GPU, counted on an emulated one."""

import pytest
import torch

from benchmarks import launches
from benchmarks.emulated_device import emulated_device
from vit.augment.policies import POLICIES
from vit.runtime.device import send
from vit.training.optimizers import OPTIMIZERS, build_optimizer
from vit.training.state import EMA
from vit.training.step import OptimizerStep

# Seconds instead of a minute: what is asked for does not depend on the width
NARROW = ("model.hidden_size=24", "model.num_layers=2", "model.num_heads=2")
TINY = (*NARROW, "augment=none", "train.batch_size=32", "data.num_images=320")
MOST_BYTES = 65_536
MOST_KERNELS = 120


def test_a_steady_step_makes_the_host_wait_nowhere():
    step = launches.steady_step(*NARROW, "augment=light", "model.drop_path=0.1")
    assert (step.mixed, step.waits) == (0, 0)
    # A model of two layers, forward and backward
    assert 100 < step.launches < 400


def test_nor_does_it_with_policies_erasing_and_mixing():
    step = launches.steady_step(*NARROW, "model.num_layers=12", "model.drop_path=0.1")
    assert (step.mixed, step.waits) == (0, 0)
    assert step.largest_copy <= MOST_BYTES


def plant(monkeypatch, work):
    """Let the averaging of the weights do more than it should."""
    update = EMA.update

    def planted(self, model, step):
        update(self, model, step)
        work(next(model.parameters()))

    monkeypatch.setattr(EMA, "update", planted)


@pytest.mark.parametrize(
    ("work", "noticed"),
    [
        (lambda weight: None, {}),
        (lambda weight: weight.sum().item(), {"waits": 1}),
        (lambda weight: weight.cpu(), {"waits": 1}),
        (lambda weight: weight[weight > 0], {"waits": 1}),
        (lambda weight: weight * torch.ones(weight.shape), {"mixed": 1}),
        (lambda weight: send(torch.zeros(1 << 20), weight.device), {"largest_copy": 4 << 20}),
    ],
    ids=["nothing", "item", "copy back", "mask", "mixed devices", "large copy"],
)
def test_what_is_planted_in_a_step_is_noticed(monkeypatch, work, noticed):
    plant(monkeypatch, work)
    step = launches.steady_step(*TINY)
    assert (step.mixed, step.waits) == (noticed.get("mixed", 0), noticed.get("waits", 0))
    expected = noticed.get("largest_copy", 0)
    assert step.largest_copy == expected if expected else step.largest_copy <= MOST_BYTES


def test_clipping_is_part_of_the_step(monkeypatch):
    without = launches.steady_step(*TINY, "train.clip_norm=null")
    clip = OptimizerStep.clip_gradients

    def planted(self):
        norm = clip(self)
        assert norm.item() > 0
        return norm

    monkeypatch.setattr(OptimizerStep, "clip_gradients", planted)
    assert launches.steady_step(*TINY).waits == without.waits + 1


@pytest.mark.parametrize("name", launches.files_of("optimizer"))
def test_an_optimizer_takes_few_kernels_and_no_wait(name):
    step = launches.optimizer_step(name)
    assert 0 < step.launches <= MOST_KERNELS
    assert (step.mixed, step.waits, step.largest_copy) == (0, 0, 0)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimizers_of_torch_are_fused_or_go_through_lists(name):
    with emulated_device("cuda") as emulated:
        model = torch.nn.Linear(4, 2).to("cuda")
        optimizer = build_optimizer(model, name=name, lr=0.1, weight_decay=0.1)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        emulated.forget()
        optimizer.step()
    assert all(kernel.startswith(("_fused_", "_foreach_")) for kernel in emulated.kernels)


def test_a_restored_optimizer_waits_nowhere():
    """Counts of steps that a checkpoint brings stay where the optimizer keeps them."""
    for name in OPTIMIZERS:
        with emulated_device("cuda") as emulated:
            first, second = (torch.nn.Linear(4, 2).to("cuda") for _ in range(2))
            optimizers = [
                build_optimizer(model, name=name, lr=0.1, weight_decay=0.1)
                for model in (first, second)
            ]
            for parameter in (*first.parameters(), *second.parameters()):
                parameter.grad = torch.ones_like(parameter)
            optimizers[0].step()
            optimizers[1].load_state_dict(optimizers[0].state_dict())
            emulated.forget()
            optimizers[1].step()
            assert not emulated.waits, name


def test_the_json_has_an_entry_for_every_file_and_policy(monkeypatch):
    asked = launches.Asked(mixed=0, waits=2, largest_copy=3, launches=4)
    made = []
    monkeypatch.setattr(launches, "steady_step", lambda: asked)
    monkeypatch.setattr(launches, "optimizer_step", lambda name: asked)
    monkeypatch.setattr(launches, "batch_making", lambda *keys: made.append(keys) or asked)
    result = launches.measure()
    assert result.keys() == {
        "mixed_devices",
        "host_waits_per_step",
        "largest_copy_bytes",
        "optimizers",
        "policies",
    }
    assert (result["mixed_devices"], result["host_waits_per_step"]) == (0, 2)
    assert result["largest_copy_bytes"] == 3
    assert result["optimizers"].keys() == OPTIMIZERS.keys() == set(launches.files_of("optimizer"))
    assert result["policies"].keys() == {"none", *POLICIES, *launches.files_of("augment")}
    assert all(entry == {"launches": 4, "host_waits": 2} for entry in result["policies"].values())
    assert ("augment=none", "augment.policy=autoaugment") in made
    assert ("augment=deit3",) in made


def test_making_a_batch_is_counted_without_the_model():
    light = launches.batch_making("augment=light", "train.batch_size=32", "data.num_images=320")
    none = launches.batch_making("augment=none", "train.batch_size=32", "data.num_images=320")
    # The images and labels are taken, and the pixels normalized
    assert (none.launches, none.waits) == (4, 0)
    assert 4 < light.launches < 20
    assert light.waits == 0
