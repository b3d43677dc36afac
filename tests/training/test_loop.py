"""The loop on a small model: what it computes, when it evaluates and saves, how it stops."""

import signal
import time
from dataclasses import dataclass, replace

import pytest
import timm
import torch
from helpers import rows
from safetensors.torch import save_file
from small_training import (
    SGD,
    MadeUpBatches,
    NotedCheckpoints,
    assert_close,
    batch,
    make_model,
    make_plan,
    make_state,
    make_trainer,
    same_bits,
)
from torch import nn

from vit.checkpoints.file import read_checkpoint
from vit.checkpoints.run import RunCheckpoints
from vit.errors import Stopped, TrainingFailed
from vit.runtime.signals import StopSignal
from vit.runtime.time_limit import TimeLimit
from vit.training.losses import build_loss
from vit.training.state import EMA, Progress
from vit.weights.loading import load_into, read

ADAMW = {"name": "adamw", "lr": 3e-3, "weight_decay": 0.0}
MUON = {
    "name": "muon",
    "lr": 0.02,
    "weight_decay": 0.01,
    "settings": {"momentum": 0.95, "nesterov": True, "adamw_lr": 2e-3},
}


def real_checkpoints(folder):
    folder.mkdir(parents=True, exist_ok=True)
    header = {"config": {}, "classes": ["a"], "preprocessing": {}, "data": 1}
    return RunCheckpoints(folder, header, writes=True)


def plain_step(model, optimizer, images, labels, label_smoothing=0.0):
    """A training step as torch's documentation writes it; returns the loss."""
    loss = nn.functional.cross_entropy(model(images), labels, label_smoothing=label_smoothing)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_one_batch_is_learned_by_heart(tmp_path):
    trainer = make_trainer(
        tmp_path,
        steps=150,
        state=make_state(optimizer=ADAMW),
        batches=MadeUpBatches(source=lambda step: batch(0)),
    )
    trainer.fit()
    images, labels = batch(0)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(trainer.state.model(images), labels)
    assert loss < 0.01


def test_the_loop_is_the_plain_algorithm(tmp_path):
    """Six steps against a loop written out with torch's own parts, in float64."""
    factors = [0.0, 0.5, 1.0, 0.8, 0.5, 0.1]
    trainer = make_trainer(
        tmp_path,
        state=make_state(make_model(torch.float64)),
        batches=MadeUpBatches(dtype=torch.float64),
        plan=make_plan(6, schedule=lambda step: factors[step]),
        loss=build_loss("cross_entropy", 0.1),
    )
    trainer.fit()

    reference = make_model(torch.float64)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.05 * factors[step]
        images, labels = batch(step)
        plain_step(reference, optimizer, images.double(), labels, label_smoothing=0.1)
    assert_close(trainer.state.model, reference, rtol=1e-9, atol=1e-12)


def reference_optimizer(name, model, weight_decay):
    """torch's own, with the weights of linear and convolution layers decayed alone."""
    layers = [item for item in model.modules() if isinstance(item, nn.Linear | nn.Conv2d)]
    decayed = [layer.weight for layer in layers]
    rest = [item for item in model.parameters() if all(item is not other for other in decayed)]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=1e-3)


@pytest.mark.parametrize(
    "settings", [SGD, {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1}], ids=["sgd", "adamw"]
)
def test_fifty_steps_are_timms(tmp_path, settings):
    """From the same weights and batches as timm's model in a plain loop, in float64: every loss
    and the last weights."""
    torch.manual_seed(1)
    theirs = timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3
    )
    save_file(theirs.state_dict(), tmp_path / "start.safetensors")
    model = make_model(torch.float64)
    load_into(model, read(tmp_path / "start.safetensors"))
    trainer = make_trainer(
        tmp_path / "run",
        state=make_state(model, settings),
        batches=MadeUpBatches(dtype=torch.float64),
        plan=make_plan(50, log_every=1),
    )
    trainer.fit()
    losses = [row["loss"] for row in rows(tmp_path / "run" / "metrics.jsonl")]

    theirs = theirs.double()
    optimizer = reference_optimizer(settings["name"], theirs, settings["weight_decay"])
    expected = []
    for step in range(50):
        images, labels = batch(step)
        expected.append(plain_step(theirs, optimizer, images.double(), labels))
    assert losses == pytest.approx(expected, rel=1e-9)
    save_file(theirs.state_dict(), tmp_path / "end.safetensors")
    weights = model.state_dict()
    for name, tensor in read(tmp_path / "end.safetensors").tensors.items():
        torch.testing.assert_close(weights[name], tensor.double(), rtol=1e-6, atol=1e-9)


def test_the_average_takes_the_weights_after_every_step(tmp_path):
    trainer = make_trainer(tmp_path, state=make_state(ema_decay=0.9))
    trainer.fit()
    expected = EMA(make_model(), 0.9)
    for step in range(6):
        # A run of so many steps ends with the weights that the long run had then
        short = make_trainer(tmp_path / str(step), steps=step + 1)
        short.fit()
        expected.update(short.state.model, step)
    assert_close(trainer.state.ema.model, expected.model)


def test_the_learning_rate_is_the_schedules_share_of_each_groups_own(tmp_path):
    state = make_state(optimizer={**ADAMW, "layer_decay": 0.5})
    trainer = make_trainer(tmp_path, state=state, plan=make_plan(6, schedule=lambda step: step / 8))
    trainer.fit()
    for group in state.optimizer.param_groups:
        assert group["lr"] == group["initial_lr"] * 5 / 8
    assert len({group["lr"] for group in state.optimizer.param_groups}) == 4


def test_not_a_number_stops_before_the_optimizer_and_names_the_step(tmp_path):
    def poisoned(step):
        images, labels = batch(step)
        if step == 3:
            images[0, 0, 0, 0] = float("nan")
        return images, labels

    batches = MadeUpBatches(source=poisoned)
    trainer = make_trainer(tmp_path, batches=batches, plan=make_plan(6, save_every=1))
    with pytest.raises(TrainingFailed, match="nan at step 4"):
        trainer.fit()
    assert trainer.checkpoints.last == [1, 2, 3]
    assert all(parameter.isfinite().all() for parameter in trainer.state.model.parameters())
    assert batches.closed


def test_a_state_with_an_unseen_loss_that_is_not_finite_is_never_saved(tmp_path):
    """On a GPU nobody looks at the loss of a step until it is logged or saved."""
    trainer = make_trainer(tmp_path, plan=make_plan(6, log_every=100))
    trainer.state.progress.step = 5
    for loss in (1.0, float("inf"), 1.0):
        trainer.observer.window.add(torch.tensor([loss, 8.0, 1.0]), 16)
    with pytest.raises(TrainingFailed, match="inf at step 4"):
        trainer.save()
    assert trainer.checkpoints.last == []


def test_weights_after_a_gradient_that_is_not_finite_are_never_saved(tmp_path):
    """The loss of the last step is that of the weights before it."""
    trainer = make_trainer(tmp_path, plan=make_plan(6, save_every=5, log_every=100))

    def explode(gradient):
        return gradient * float("inf") if trainer.state.progress.step == 4 else gradient

    trainer.state.model.head.bias.register_hook(explode)
    with pytest.raises(TrainingFailed, match=r"gradient is (nan|inf) at step 5"):
        trainer.fit()
    assert (trainer.checkpoints.last, trainer.checkpoints.best) == ([], [])


@pytest.mark.parametrize("select", ["top1", "loss"])
@pytest.mark.parametrize("losses", [(float("nan"),), (1.0, float("nan"))], ids=["first", "second"])
def test_a_validation_loss_that_is_not_finite_is_no_improvement(tmp_path, select, losses):
    state = make_state()
    state.select = select
    batches = MadeUpBatches(evaluations=[{"loss": loss, "top1": 0.5} for loss in losses])
    trainer = make_trainer(tmp_path, state=state, batches=batches)
    step = 3 * len(losses)
    with pytest.raises(TrainingFailed, match=rf"validation loss is nan at step {step}"):
        trainer.fit()
    assert trainer.checkpoints.best == [3][: len(losses) - 1]
    assert state.progress.best_loss == (None if len(losses) == 1 else 1.0)


def stop_in_forward_pass(trainer, number, signal_number):
    """Let a signal arrive during the forward pass of this number, counted from 1."""
    model, passes = trainer.state.model, []

    def forward(images, keep):
        passes.append(1)
        if len(passes) == number:
            trainer.stop.receive(signal_number, None)
        return model(images, keep)

    trainer.step.forward = forward


def limited(trainer, seconds):
    """The trainer with a limit of time that has so many seconds left, and no alarm."""
    trainer.stop.time_limit = TimeLimit(1, time.monotonic() - 57 + seconds)
    trainer.stop.set_alarm = lambda time_limit: None
    return trainer


def test_no_step_is_begun_that_would_end_too_late(tmp_path):
    trainer = limited(make_trainer(tmp_path), 100)
    trainer.observer.clock.seconds_per_step = lambda step: 20.0 * step
    with pytest.raises(Stopped, match=r"runtime\.max_minutes=1 after step 3"):
        trainer.fit()
    assert trainer.checkpoints.last == [3]
    assert trainer.batches.closed


def test_time_is_kept_for_a_save_as_long_as_the_last(tmp_path, monkeypatch):
    trainer = limited(make_trainer(tmp_path, plan=make_plan(6, save_every=2)), 100)
    save_last, now = trainer.checkpoints.save_last, time.monotonic
    late = []

    def slow_save(state):
        save_last(state)
        late.append(40)

    trainer.checkpoints.save_last = slow_save
    monkeypatch.setattr(time, "monotonic", lambda: now() + sum(late))
    with pytest.raises(Stopped, match=r"runtime\.max_minutes=1 after step 3"):
        trainer.fit()
    # 60 s were left after the first save, of which the next may take twice 40
    assert trainer.checkpoints.last == [2, 3]


def test_an_evaluation_that_would_end_too_late_is_left_to_the_next_start(tmp_path):
    evaluations = [{"loss": 1.0, "top1": 0.5}, {"loss": 0.5, "top1": 0.6}]
    batches = StoppableBatches(evaluations=evaluations)
    state = make_state()
    trainer = limited(make_trainer(tmp_path, state=state, batches=batches), 1000)
    batches.stop = trainer.stop
    trainer.evaluation_seconds = 2000.0
    with pytest.raises(Stopped, match=r"runtime\.max_minutes=1 in an evaluation"):
        trainer.fit()
    assert trainer.checkpoints.last == [3]
    assert state.progress.evaluated_step == 0
    resumed = make_trainer(tmp_path, state=state, batches=batches)
    batches.stop = resumed.stop
    resumed.fit()
    assert (state.progress.step, state.progress.best_step, evaluations) == (6, 6, [])


@dataclass
class StoppableBatches(MadeUpBatches):
    """As the real ones, an evaluation looks at the signal before its first batch."""

    stop: StopSignal | None = None

    def evaluate(self, model, *others):
        if self.stop:
            raise Stopped(f"stopped by {self.stop.describe()} in an evaluation")
        return super().evaluate(model, *others)


def test_a_signal_in_the_last_micro_batch_lets_the_step_finish(tmp_path):
    trainer = make_trainer(tmp_path, micro_batch_size=8)
    stop_in_forward_pass(trainer, 6, signal.SIGTERM)  # the second of two in step 3
    with pytest.raises(Stopped, match="SIGTERM after step 3"):
        trainer.fit()
    assert trainer.checkpoints.last == [3]
    assert trainer.batches.closed


def test_a_signal_between_micro_batches_drops_the_part_of_the_gradient(tmp_path):
    trainer = make_trainer(tmp_path / "stopped", micro_batch_size=8)
    stop_in_forward_pass(trainer, 5, signal.SIGINT)  # the first of two in step 3
    with pytest.raises(Stopped, match="SIGINT after step 2"):
        trainer.fit()
    assert trainer.checkpoints.last == [2]
    assert all(parameter.grad is None for parameter in trainer.state.model.parameters())
    two_steps = make_trainer(tmp_path / "two", steps=2, micro_batch_size=8)
    two_steps.fit()
    assert same_bits(trainer.state.model, two_steps.state.model)


def fail_in_forward_pass(trainer, number, error):
    """As where a terminal's Ctrl-C has ended the compiler as well: a signal, and an error."""
    model, passes = trainer.state.model, []

    def forward(images, keep):
        passes.append(1)
        if len(passes) == number:
            trainer.stop.name = "SIGINT"
            raise error
        return model(images, keep)

    trainer.step.forward = forward


def test_a_signal_to_a_first_step_that_compiles_ends_at_once(tmp_path):
    trainer = make_trainer(tmp_path)
    stop_in_forward_pass(trainer, 1, signal.SIGINT)
    trainer.step.compiled = True
    with pytest.raises(Stopped, match="SIGINT within a step"):
        trainer.fit()
    # What it started from is on the disk
    assert trainer.checkpoints.last == []
    assert trainer.batches.closed


def test_an_error_of_the_compiler_after_a_signal_is_the_stop(tmp_path):
    trainer = make_trainer(tmp_path)
    fail_in_forward_pass(trainer, 1, RuntimeError("2,788 lines of warnings"))
    trainer.step.compiled = True
    with pytest.raises(Stopped, match="SIGINT within a step"):
        trainer.fit()
    # Later, where something was computed, it is saved
    later = make_trainer(tmp_path / "later")
    fail_in_forward_pass(later, 3, RuntimeError("2,788 lines of warnings"))
    with pytest.raises(Stopped, match="SIGINT after step 2"):
        later.fit()
    assert later.checkpoints.last == [2]


def test_an_error_without_a_signal_is_a_bug(tmp_path):
    trainer = make_trainer(tmp_path)

    def forward(images, keep):
        raise RuntimeError("shapes do not match")

    trainer.step.forward = forward
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.fit()


def test_saving_is_due_every_so_many_steps_and_at_the_end(tmp_path):
    trainer = make_trainer(tmp_path, plan=make_plan(7, save_every=3))
    trainer.fit()
    assert trainer.checkpoints.last == [3, 6, 7]
    # Nothing is held out: the last weights are the best
    assert trainer.checkpoints.best == [7]
    assert trainer.state.progress.best_step == 7


def test_the_best_on_validation_images_is_kept(tmp_path):
    evaluations = [{"loss": 1.0, "top1": 0.5}, {"loss": 0.5, "top1": 0.4}]
    trainer = make_trainer(tmp_path, batches=MadeUpBatches(evaluations=evaluations))
    trainer.fit()
    assert trainer.checkpoints.best == [3]
    assert (trainer.state.progress.best_step, trainer.state.progress.best_top1) == (3, 0.5)
    validation = [row for row in rows(tmp_path / "metrics.jsonl") if row["split"] == "val"]
    assert [(row["step"], row["top1"]) for row in validation] == [(3, 0.5), (6, 0.4)]


def test_the_last_weights_do_not_get_the_numbers_of_an_evaluation_before(tmp_path):
    """Where a run is resumed with all images to train on (data.val_fraction=0)."""
    state = make_state()
    state.progress = Progress(best_step=3, best_top1=0.5, best_loss=1.0)
    make_trainer(tmp_path, state=state).fit()
    assert state.progress.best_step == 6
    assert set(state.progress.best().values()) == {None}


def test_the_best_is_what_train_select_names(tmp_path):
    evaluations = [
        {"loss": 1.0, "top1": 0.9, "macro_f1": 0.5},
        {"loss": 2.0, "top1": 0.4, "macro_f1": 0.6},
    ]
    for select, best in (("top1", [3]), ("loss", [3]), ("macro_f1", [3, 6])):
        state = make_state()
        state.select = select
        batches = MadeUpBatches(evaluations=list(evaluations))
        trainer = make_trainer(tmp_path / select, state=state, batches=batches)
        trainer.fit()
        assert trainer.checkpoints.best == best, select


def test_the_loop_ends_where_validation_does_not_improve_for_so_long(tmp_path):
    evaluations = [{"loss": 1.0, "top1": top1} for top1 in (0.5, 0.6, 0.6, 0.5, 0.9)]
    plan = replace(make_plan(10), eval_every=0.2, patience=2)
    batches = MadeUpBatches(evaluations=evaluations)
    trainer = make_trainer(tmp_path, batches=batches, plan=plan)
    trainer.fit()
    # The third had neither a higher accuracy nor a lower loss
    assert trainer.state.progress.step == 4
    assert trainer.state.progress.best_step == 2
    assert trainer.checkpoints.last == [4]
    assert trainer.batches.closed
    assert evaluations == [{"loss": 1.0, "top1": 0.9}]


def test_a_signal_in_an_evaluation_saves_and_a_resumed_run_evaluates_anew(tmp_path):
    checkpoints = NotedCheckpoints()
    batches = MadeUpBatches(evaluations=[Stopped("stopped by SIGTERM in an evaluation")])
    state = make_state()
    trainer = make_trainer(tmp_path, state=state, batches=batches, checkpoints=checkpoints)
    with pytest.raises(Stopped):
        trainer.fit()
    assert (checkpoints.last, checkpoints.best) == ([3], [])
    assert state.progress.evaluated_step == 0

    evaluations = [{"loss": 1.0, "top1": 0.5}, {"loss": 0.5, "top1": 0.6}]
    make_trainer(tmp_path, state=state, batches=MadeUpBatches(evaluations=evaluations)).fit()
    logged = [(row["step"], row["split"]) for row in rows(tmp_path / "metrics.jsonl")]
    assert logged == [(2, "train"), (3, "train"), (3, "val"), *logged[3:]]
    assert logged[3:] == [(4, "train"), (6, "train"), (6, "val")]


def test_a_resumed_run_does_not_evaluate_a_step_twice(tmp_path):
    evaluations = [{"loss": 1.0, "top1": 0.5}, {"loss": 0.5, "top1": 0.6}]
    batches = MadeUpBatches(evaluations=evaluations)
    state = make_state()
    state.progress.step = state.progress.evaluated_step = 3
    make_trainer(tmp_path, state=state, batches=batches).fit()
    assert len(evaluations) == 1


def stop_after(trainer, step):
    """Let a signal arrive in the last micro-batch of this step."""
    stop_in_forward_pass(trainer, step, signal.SIGTERM)


@pytest.mark.parametrize("optimizer", [SGD, ADAMW, MUON], ids=lambda settings: settings["name"])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, optimizer):
    """By way of real checkpoints, stopped between two rows of the log, with dropout, stochastic
    depth and an average."""

    def begin(name, resuming=False):
        state = make_state(make_model(dropout=0.2, drop_path=0.2), optimizer, ema_decay=0.9)
        checkpoints = real_checkpoints(tmp_path / name / "checkpoints")
        if resuming:
            checkpoints.resume(state, may_differ=False)
        plan = make_plan(8, log_every=4)
        return make_trainer(tmp_path / name, state=state, checkpoints=checkpoints, plan=plan)

    whole = begin("whole")
    whole.fit()
    stopped = begin("parts")
    stop_after(stopped, 6)
    with pytest.raises(Stopped, match="after step 6"):
        stopped.fit()
    resumed = begin("parts", resuming=True)
    assert resumed.state.progress.step == 6
    resumed.fit()

    assert same_bits(whole.state.model, resumed.state.model)
    assert same_bits(whole.state.ema.model, resumed.state.ema.model)
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert texts[0] == texts[1]
    for name in ("last", "best"):
        files = [
            tmp_path / run / "checkpoints" / f"{name}.safetensors" for run in ("whole", "parts")
        ]
        (ours, _), (theirs, _) = map(read_checkpoint, files)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_best_of_steps_that_a_kill_has_cost_stays_the_best(tmp_path):
    """Where the same steps do not come to it again, as on a GPU."""

    def begin(*top1):
        evaluations = [{"loss": 1.0, "top1": value} for value in top1]
        batches = MadeUpBatches(evaluations=evaluations)
        checkpoints = real_checkpoints(tmp_path / "checkpoints")
        return make_trainer(tmp_path, batches=batches, checkpoints=checkpoints)

    killed = begin(0.5, 0.9)
    killed.checkpoints.save_last(killed.state)
    # The kill comes after the evaluation of step 6, and before the next save
    killed.save = lambda: None
    killed.fit()

    resumed = begin(0.5, 0.8)
    resumed.checkpoints.resume(resumed.state, may_differ=False)
    assert resumed.state.progress.step == 0
    resumed.fit()
    progress = resumed.state.progress
    assert (progress.step, progress.best_step, progress.best_top1) == (6, 6, 0.9)
    _, header = read_checkpoint(tmp_path / "checkpoints" / "best.safetensors")
    assert header["progress"]["best_top1"] == 0.9


def test_saving_at_the_start_changes_nothing(tmp_path):
    plain = make_trainer(tmp_path / "plain", state=make_state(optimizer=ADAMW))
    plain.fit()
    saved = make_trainer(
        tmp_path / "saved",
        state=make_state(optimizer=ADAMW),
        checkpoints=real_checkpoints(tmp_path / "saved" / "checkpoints"),
    )
    saved.checkpoints.save_last(saved.state)
    assert not saved.state.optimizer.state
    saved.fit()
    assert same_bits(plain.state.model, saved.state.model)


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    state = make_state()
    make_trainer(tmp_path, state=state).fit()
    before = [parameter.clone() for parameter in state.model.parameters()]
    again = make_trainer(tmp_path, state=state)
    again.fit()
    assert state.progress.step == 6
    assert all(map(torch.equal, before, state.model.parameters()))
