"""What a checkpoint holds of a training: every optimizer resumes to the same bits."""

import copy

import pytest
import torch
from small_training import (
    SGD,
    batch,
    make_model,
    make_state,
    make_step,
    same_bits,
)

from vit.errors import CheckpointError
from vit.training.optimizers import OPTIMIZERS, Grouping, parameter_groups
from vit.training.state import EMA, Progress, load_optimizer_tensors, optimizer_tensors

ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05}
LAMB = {"name": "lamb", "lr": 3e-3, "weight_decay": 0.05}
MUON = {
    "name": "muon",
    "lr": 0.02,
    "weight_decay": 0.01,
    "settings": {"adamw_lr": 2e-3, "momentum": 0.95, "nesterov": True},
}
PLAIN_SGD = {"name": "sgd", "lr": 0.05, "weight_decay": 0.0}
ODD = {"name": "odd", "lr": 0.05, "weight_decay": 0.1, "settings": {"friction": 0.5}}


class OddOptimizer(torch.optim.Optimizer):
    """Keeps a velocity and a count without dimensions for decayed parameters, nothing for others.

    The velocity has one dimension fewer than its parameter and starts at one, so that guessing its
    shape or its start by those of other optimizers would fail.
    """

    def __init__(self, groups, friction):
        super().__init__(groups, {"friction": friction, "lr": 1.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if group["role"] != "decay":
                    parameter.sub_(parameter.grad, alpha=group["lr"])
                    continue
                state = self.state[parameter]
                if not state:
                    state["count"] = torch.zeros((), dtype=torch.int64)
                    state["velocity"] = torch.ones_like(parameter[0])
                state["count"] += 1
                state["velocity"].mul_(group["friction"]).add_(parameter.grad.sum(0))
                parameter.sub_(state["velocity"] / state["count"], alpha=group["lr"])


def odd(model, grouping: Grouping, *, friction: float) -> torch.optim.Optimizer:
    return OddOptimizer(parameter_groups(model, grouping), friction)


@pytest.fixture(autouse=True)
def _odd_optimizer(monkeypatch):
    """An optimizer that the program has never seen is one more builder in the table."""
    monkeypatch.setitem(OPTIMIZERS, "odd", odd)


def train(state, steps):
    """So many optimizer steps from where the state stands."""
    step = make_step(state)
    for _ in range(steps):
        assert step(*batch(state.progress.step)) is not None
        if state.ema is not None:
            state.ema.update(state.model, state.progress.step)
        state.progress.step += 1


def header_of(state):
    """What RunCheckpoints writes of a state into a file's header."""
    return {
        "progress": state.progress.to_dict(),
        "precision": state.precision.name,
        "newton_schulz": state.newton_schulz,
    }


def restored(tensors, header, optimizer):
    """A state that began differently, with these tensors."""
    model = make_model()
    torch.nn.init.normal_(model.head.weight)
    state = make_state(model, optimizer, ema_decay=0.9)
    state.restore(tensors, header, "run/last.safetensors")
    return state


@pytest.mark.parametrize(
    "optimizer",
    [ADAMW, SGD, LAMB, MUON, PLAIN_SGD, ODD],
    ids=["adamw", "sgd", "lamb", "muon", "plain sgd", "odd"],
)
def test_a_saved_state_continues_to_the_same_bits(optimizer):
    state = make_state(optimizer=optimizer, ema_decay=0.9)
    train(state, 3)
    saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    header = copy.deepcopy(header_of(state))
    twin = restored(saved, header, optimizer)
    assert twin.progress.step == 3
    assert same_bits(twin.model, state.model)
    assert same_bits(twin.ema.model, state.ema.model)
    for item in (state, twin):
        train(item, 3)
    assert same_bits(twin.model, state.model)
    assert same_bits(twin.ema.model, state.ema.model)
    ours, theirs = state.tensors(), twin.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_a_made_up_optimizer_keeps_is_saved_under_its_own_names():
    state = make_state(optimizer=ODD)
    train(state, 2)
    names = {name for name in state.tensors() if name.startswith("optimizer/")}
    decayed = [
        name
        for name, parameter in state.model.named_parameters()
        if any(parameter is item for item in state.optimizer.param_groups[0]["params"])
    ]
    assert 0 < len(decayed) < len(list(state.model.parameters()))
    keys = ("count", "velocity")
    assert names == {f"optimizer/{name}/{key}" for name in decayed for key in keys}
    assert state.tensors()["optimizer/head.weight/count"].item() == 2


def test_an_optimizer_that_keeps_plain_numbers_is_not_saved_without_them():
    """A resumed run would silently begin to count again."""
    state = make_state(optimizer=ODD)
    train(state, 1)
    state.optimizer.state[state.model.head.weight]["count"] = 1
    with pytest.raises(AssertionError, match=r"head\.weight/count"):
        state.tensors()


@pytest.mark.parametrize("optimizer", [ODD, ADAMW], ids=["odd", "adamw"])
def test_a_missing_tensor_of_the_optimizer_is_named(optimizer):
    state = make_state(optimizer=optimizer, ema_decay=0.9)
    train(state, 1)
    tensors = state.tensors()
    key = "velocity" if optimizer is ODD else "exp_avg"
    del tensors[f"optimizer/head.weight/{key}"]
    with pytest.raises(CheckpointError, match=rf"run/last.* head\.weight/{key} is missing"):
        restored(tensors, header_of(state), optimizer)


def test_an_unexpected_tensor_of_the_optimizer_is_named():
    state = make_state(optimizer=ODD, ema_decay=0.9)
    train(state, 1)
    tensors = {**state.tensors(), "optimizer/head.bias/velocity": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"run/last.* head\.bias/velocity"):
        restored(tensors, header_of(state), ODD)


def test_another_optimizers_state_is_refused():
    state = make_state(optimizer=ADAMW, ema_decay=0.9)
    train(state, 1)
    with pytest.raises(
        CheckpointError,
        match=r"of another optimizer.*is (missing|unexpected); leave optimizer, train.freeze",
    ):
        restored(state.tensors(), header_of(state), ODD)


def test_optimizer_tensors_before_any_step_are_refused():
    state = make_state(optimizer=ADAMW, ema_decay=0.9)
    tensors = {**state.tensors(), "optimizer/head.bias/exp_avg": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"head\.bias/exp_avg"):
        restored(tensors, header_of(state), ADAMW)


@pytest.mark.parametrize("optimizer", [ADAMW, ODD, MUON], ids=lambda settings: settings["name"])
def test_an_untouched_optimizer_is_not_asked_for_its_state(optimizer):
    """torch would make a step of it; a run that saved at step 0 equals one that did not."""
    plain = make_state(optimizer=optimizer)
    saved = make_state(optimizer=optimizer)
    names = saved.tensors().keys()
    assert {name.partition("/")[0] for name in names} == {"model"}
    assert not saved.optimizer.state
    for state in (plain, saved):
        train(state, 2)
    assert same_bits(plain.model, saved.model)
    ours, theirs = plain.tensors(), saved.tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_state_of_step_0_starts_the_same_run():
    state = make_state(optimizer=ADAMW, ema_decay=0.9)
    tensors = {name: tensor.clone() for name, tensor in state.tensors().items()}
    twin = restored(tensors, header_of(state), ADAMW)
    for item in (state, twin):
        train(item, 2)
    assert same_bits(state.model, twin.model)
    assert same_bits(state.ema.model, twin.ema.model)


def test_restoring_an_optimizer_leaves_the_weights_alone():
    """torch finds out what an optimizer keeps by a step at learning rate 0, which may still change
    weights; they are loaded after it."""
    state = make_state(optimizer=ADAMW)
    train(state, 1)
    tensors = {
        name: tensor.clone()
        for name, tensor in optimizer_tensors(state.model, state.optimizer).items()
    }
    twin = make_state(optimizer=ADAMW)
    load_optimizer_tensors(twin.model, twin.optimizer, tensors, "source")
    again = optimizer_tensors(twin.model, twin.optimizer)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    rates = [group["lr"] for group in twin.optimizer.param_groups]
    assert rates == [group["lr"] for group in state.optimizer.param_groups]


def test_weights_of_another_model_are_refused():
    state = make_state(make_model(hidden_size=32), ADAMW, ema_decay=0.9)
    with pytest.raises(CheckpointError, match=r"run/last\.safetensors: weights of another model"):
        restored(state.tensors(), header_of(state), ADAMW)


def test_an_average_that_is_asked_for_later_is_refused_by_its_own_name():
    state = make_state(optimizer=ADAMW)
    train(state, 2)
    with pytest.raises(CheckpointError, match=r"run/last\.safetensors: .*train\.ema_decay=0"):
        restored(state.tensors(), header_of(state), ADAMW)


def measured(**metrics):
    """The metrics of an evaluation, of which some are given."""
    return {"top1": 0.5, "balanced_top1": 0.5, "macro_f1": 0.5, "loss": 1.0, **metrics}


def test_best_is_higher_accuracy_then_lower_loss():
    progress = Progress(step=1)
    assert progress.improve(measured(top1=0.5, loss=1.0))
    assert not progress.improve(measured(top1=0.5, loss=1.1))
    progress.step = 2
    assert progress.improve(measured(top1=0.5, loss=0.9))
    assert (progress.best_step, progress.best_loss) == (2, 0.9)
    assert not progress.improve(measured(top1=0.4, loss=0.1))


@pytest.mark.parametrize("select", ["balanced_top1", "macro_f1"])
def test_best_is_what_is_selected_by(select):
    progress = Progress(step=1)
    assert progress.improve(measured(top1=0.9), select)
    progress.step = 2
    assert progress.improve(measured(top1=0.1, loss=9.0, **{select: 0.6}), select)
    assert not progress.improve(measured(top1=1.0, loss=0.0), select)
    assert progress.improve(measured(loss=8.0, **{select: 0.6}), select)
    assert progress.best_score(select) == 0.6
    assert progress.best()["top1"] == 0.5


def test_of_the_loss_the_lowest_is_best_and_its_negative_is_maximized():
    progress = Progress(step=1)
    assert progress.best_score("loss") is None
    assert progress.improve(measured(top1=0.9, loss=1.0), "loss")
    assert not progress.improve(measured(top1=1.0, loss=1.0), "loss")
    progress.step = 2
    assert progress.improve(measured(top1=0.1, loss=0.9), "loss")
    assert (progress.best_step, progress.best_score("loss")) == (2, -0.9)


def test_a_best_of_an_earlier_version_gives_way_to_what_can_be_compared():
    """It noted top-1 and loss alone."""
    progress = Progress(step=5, best_step=4, best_top1=0.9, best_loss=0.1)
    assert not progress.improve(measured(), "top1")
    assert not progress.improve(measured(), "loss")
    assert progress.improve(measured(), "macro_f1")
    assert progress.best_step == 5


def test_progress_survives_a_dictionary():
    progress = Progress(step=3, best_top1=0.5, scaler={"scale": 2.0}, micro_batch_size=4)
    assert Progress.from_dict(progress.to_dict(), "file") == progress


def test_progress_of_an_earlier_version_is_understood():
    values = Progress(step=3).to_dict()
    for name in ("micro_batch_size", "best_balanced_top1", "best_macro_f1", "images"):
        del values[name]
    assert Progress.from_dict(values, "file") == Progress(step=3)


def test_progress_of_a_stranger_is_refused():
    values = Progress(step=3).to_dict()
    without_step = {key: value for key, value in values.items() if key != "step"}
    for other in (without_step, {**values, "mood": "good"}):
        with pytest.raises(CheckpointError, match=r"file: .*progress"):
            Progress.from_dict(other, "file")


def test_the_average_follows_its_formula():
    model = make_model()
    average = EMA(model, decay=0.5)
    expected = model.head.bias.detach().clone()
    for number in range(12):
        with torch.no_grad():
            model.head.bias += 1
        average.update(model, number)
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * model.head.bias.detach()
    torch.testing.assert_close(average.model.head.bias, expected)
    assert not average.model.head.bias.requires_grad
    assert not average.model.training


def test_the_average_is_what_is_evaluated_and_saved_as_best():
    averaged, raw = make_state(ema_decay=0.9), make_state()
    train(averaged, 2)
    assert averaged.selected() is averaged.ema.model
    assert raw.selected() is raw.model
    tensors = averaged.selected_tensors()
    assert tensors.keys() == averaged.model.state_dict().keys()
    assert torch.equal(tensors["head.bias"], averaged.ema.model.head.bias)
    assert not torch.equal(tensors["head.bias"], averaged.model.head.bias)
