"""The loop on a small model and made-up batches, without configuration or data sets."""

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from vit.errors import Stopped, TrainingFailed
from vit.model.vision_transformer import VisionTransformer
from vit.runs.metrics_log import Tracker
from vit.runtime.precision import Precision
from vit.runtime.processes import Processes
from vit.runtime.signals import StopSignal
from vit.training.loop import Trainer
from vit.training.losses import build_loss
from vit.training.optimizers import build_optimizer
from vit.training.plan import every_interval
from vit.training.state import EMA, Progress, TrainingState
from vit.training.step import draw_drop_path, find_micro_batch_size
from vit.weights.loading import load_into, read

CPU = torch.device("cpu")


def batch(step, size=16):
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 3, (size,), generator=generator)
    images = torch.randn(size, 3, 8, 8, generator=generator) + labels[:, None, None, None]
    return images, labels


def make_trainer(
    folder,
    steps=6,
    dtype=torch.float32,
    model_settings=None,
    optimizer=None,
    batches=None,
    **changes,
):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_classes=3,
        **(model_settings or {}),
    ).to(dtype)
    settings = {"name": "sgd", "lr": 0.05, "weight_decay": 0.0, "momentum": 0.9, "nesterov": True}
    built = build_optimizer(model, **{**settings, **(optimizer or {})})
    stream = (
        (images.to(dtype), labels) for images, labels in (batches or map(batch, range(steps + 5)))
    )
    saves: list[int] = []
    trainer = Trainer(
        state=TrainingState(model, None, built, Progress()),
        forward=model,
        shared=model,
        precision=Precision("fp32", CPU),
        batches=stream,
        schedule=lambda step: 1.0,
        total_steps=steps,
        batch_size=16,
        group=Processes(),
        micro_batch_size=None,
        loss=build_loss("cross_entropy", 0.0),
        clip_norm=1.0,
        drop_path_schedule="linear",
        seed=0,
        tracker=Tracker(folder, 0, steps, steps / 2, 16),
        stop=StopSignal(),
        evaluate=None,
        evaluation_due=every_interval(steps / 2, steps),
        save_best=lambda: None,
        save_last=lambda: saves.append(trainer.state.progress.step),
        forecast=lambda seconds: None,
        draw_attention=lambda model, step: None,
        drawing_due=every_interval(None, steps),
        log_every=2,
        save_every=None,
        step_share=lambda rate: 0.5,
    )
    for name, value in changes.items():
        setattr(trainer, name, value)
    trainer.saves = saves
    return trainer


def test_one_batch_is_learnt_by_heart(tmp_path):
    same = [batch(0)] * 150
    trainer = make_trainer(
        tmp_path,
        steps=150,
        batches=iter(same),
        optimizer={"name": "adamw", "lr": 3e-3, "momentum": None, "nesterov": None},
    )
    trainer.fit()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(trainer.state.model(same[0][0]), same[0][1])
    assert loss < 0.01


def test_the_loop_is_the_plain_algorithm(tmp_path):
    """Six steps against a loop written out with torch's own parts, in float64."""
    trainer = make_trainer(
        tmp_path,
        dtype=torch.float64,
        loss=build_loss("cross_entropy", 0.1),
        schedule=lambda step: [0.0, 0.5, 1.0, 0.8, 0.5, 0.1][step],
    )
    reference = copy.deepcopy(trainer.state.model)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    schedule = trainer.schedule
    trainer.fit()
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.05 * schedule(step)
        images, labels = batch(step)
        torch.nn.functional.cross_entropy(
            reference(images.double()), labels, label_smoothing=0.1
        ).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(trainer.state.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fifty_steps_are_timms(tmp_path, name):
    """From the same weights and batches as timm's model in a plain loop, in float64: every loss and the last weights."""
    adamw = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "momentum": None, "nesterov": None}
    settings = adamw if name == "adamw" else {}
    torch.manual_seed(1)
    theirs = timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3
    )
    save_file(theirs.state_dict(), tmp_path / "start.safetensors")
    trainer = make_trainer(tmp_path, steps=50, dtype=torch.float64, optimizer=settings)
    load_into(trainer.state.model, read(tmp_path / "start.safetensors"))
    losses = []
    trainer.tracker.train = lambda step, loss, **others: losses.append(loss)
    trainer.log_every = 1
    trainer.fit()

    theirs = theirs.double()
    layers = {
        module.weight
        for module in theirs.modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    decayed = [parameter for parameter in theirs.parameters() if parameter in layers]
    rest = [parameter for parameter in theirs.parameters() if parameter not in layers]
    groups = [
        {"params": decayed, "weight_decay": settings.get("weight_decay", 0.0)},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = (
        torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
        if name == "sgd"
        else torch.optim.AdamW(groups, lr=1e-3)
    )
    expected = []
    for step in range(50):
        images, labels = batch(step)
        loss = torch.nn.functional.cross_entropy(theirs(images.double()), labels)
        expected.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(expected, rel=1e-9)
    save_file(theirs.state_dict(), tmp_path / "end.safetensors")
    weights = trainer.state.model.state_dict()
    for key, tensor in read(tmp_path / "end.safetensors").tensors.items():
        torch.testing.assert_close(weights[key], tensor.double(), rtol=1e-6, atol=1e-9)


def mixed_batch(step, size=16):
    images, labels = batch(step, size)
    return images, torch.nn.functional.one_hot(labels, 3) * 0.7 + torch.nn.functional.one_hot(
        labels.flip(0), 3
    ) * 0.3


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
@pytest.mark.parametrize("size", [1, 5, 8, 16, 100])
def test_micro_steps_leave_the_result_as_it_is(tmp_path, size, loss):
    """With labels and with the shares of mixed images."""
    make, source = build_loss(loss, 0.1), batch if loss == "cross_entropy" else mixed_batch
    whole, parts = (
        make_trainer(
            tmp_path / name, loss=make, batches=map(source, range(6)), micro_batch_size=micro
        )
        for name, micro in (("a", None), ("b", size))
    )
    whole.fit()
    parts.fit()
    for a, b in zip(whole.state.model.parameters(), parts.state.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_average_takes_the_weights_after_every_step(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.state.average = EMA(trainer.state.model, 0.9)
    trainer.fit()
    other = make_trainer(tmp_path / "other")
    expected = EMA(other.state.model, 0.9)
    for step in range(6):
        other.total_steps = step + 1
        other.fit()
        expected.update(other.state.model, step)
    for a, b in zip(
        trainer.state.average.model.parameters(), expected.model.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_dropout_depends_on_the_step_alone(tmp_path):
    settings = {"dropout": 0.3, "attention_dropout": 0.2}
    first = make_trainer(tmp_path / "a", model_settings=settings)
    second = make_trainer(tmp_path / "b", model_settings=settings)
    first.fit()
    torch.rand(17)
    second.fit()
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            first.state.model.parameters(), second.state.model.parameters(), strict=True
        )
    )
    other = make_trainer(tmp_path / "c", model_settings=settings, seed=1)
    other.fit()
    pairs = zip(first.state.model.parameters(), other.state.model.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_nan_stops_before_the_optimizer_and_names_the_step(tmp_path):
    batches = [batch(step) for step in range(6)]
    batches[3][0][0, 0, 0, 0] = float("nan")
    trainer = make_trainer(tmp_path, batches=iter(batches), save_every=1)
    with pytest.raises(TrainingFailed, match="the loss is nan at step 4"):
        trainer.fit()
    assert trainer.saves == [1, 2, 3]
    assert all(parameter.isfinite().all() for parameter in trainer.state.model.parameters())


def test_a_signal_saves_the_last_whole_step(tmp_path):
    trainer = make_trainer(tmp_path, micro_batch_size=8)
    forwards = []

    def forward(images, keep):
        forwards.append(1)
        if len(forwards) == 6:  # the second micro-step of step 3
            trainer.stop.signal = "SIGTERM"
        return trainer.state.model(images)

    trainer.forward = forward
    with pytest.raises(Stopped, match="SIGTERM after step 3"):
        trainer.fit()
    assert trainer.saves == [3]
    trainer = make_trainer(tmp_path / "b", micro_batch_size=8)
    forwards.clear()

    def forward_between(images, keep):
        forwards.append(1)
        if len(forwards) == 5:  # the first micro-step of step 3: its gradient is dropped
            trainer.stop.signal = "SIGINT"
        return trainer.state.model(images)

    trainer.forward = forward_between
    with pytest.raises(Stopped, match="SIGINT after step 2"):
        trainer.fit()
    assert all(parameter.grad is None for parameter in trainer.state.model.parameters())


def test_an_fp16_overflow_repeats_the_step_at_a_lower_scale(tmp_path):
    trainer = make_trainer(tmp_path, precision=Precision("fp16", CPU))
    trainer.state.progress.scaler = {
        "scale": 2.0**40,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 0,
    }
    steps_of_average = []
    average = EMA(trainer.state.model, 0.9)
    average.update = lambda model, step: steps_of_average.append(step)
    trainer.state.average = average
    trainer.fit()
    assert trainer.state.progress.scaler["scale"] < 2.0**30
    assert steps_of_average == list(range(6))
    reference = make_trainer(tmp_path / "fp32")
    reference.fit()
    for a, b in zip(
        trainer.state.model.parameters(), reference.state.model.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0.05, atol=3e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses(smoothing):
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    shares = (
        torch.nn.functional.one_hot(labels, 4) * 0.6
        + torch.nn.functional.one_hot(labels.roll(1), 4) * 0.4
    )
    for targets in (labels, shares):
        whole = targets if targets.ndim == 2 else torch.nn.functional.one_hot(labels, 4)
        smoothed = whole * (1 - smoothing) + smoothing / 4
        entropy = -(smoothed * logits.log_softmax(1)).sum()
        torch.testing.assert_close(build_loss("cross_entropy", smoothing)(logits, targets), entropy)
        smoothed = (whole > 0) * (
            1 - smoothing
        ) + smoothing / 4  # both classes of a mixed image wholly
        binary = (
            -(smoothed * logits.sigmoid().log() + (1 - smoothed) * (1 - logits.sigmoid()).log())
            .mean(1)
            .sum()
        )
        torch.testing.assert_close(build_loss("bce", smoothing)(logits, targets), binary)
    with pytest.raises(ValueError, match="cross_entropy or bce"):
        build_loss("hinge", 0.0)


def test_mixed_images_have_no_training_accuracy(tmp_path):
    trainer = make_trainer(tmp_path, batches=map(mixed_batch, range(6)))
    trainer.fit()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows} == {"train"}
    assert all("top1" not in row and row["loss"] > 0 for row in rows)


def test_drop_path_rises_or_is_constant():
    rising, constant = (
        draw_drop_path(0.5, 5, 4000, 0, 0, schedule) for schedule in ("linear", "constant")
    )
    assert (rising == 0).float().mean((0, 2)).tolist() == pytest.approx(
        [0, 0.125, 0.25, 0.375, 0.5], abs=0.02
    )
    assert (constant == 0).float().mean((0, 2)).tolist() == pytest.approx([0.5] * 5, abs=0.02)
    assert set(constant.unique().tolist()) == {0.0, 2.0}
    assert rising.mean((0, 2)).tolist() == pytest.approx([1.0] * 5, abs=0.03)


def test_checkpointed_activations_leave_the_result_as_it_is(tmp_path):
    settings = {"dropout": 0.3, "drop_path": 0.3}
    plain, lean = (make_trainer(tmp_path / name, model_settings=settings) for name in "ab")
    lean.state.model.encoder.checkpointing = True
    kept = {}
    for name, trainer in (("plain", plain), ("lean", lean)):
        sizes = kept[name] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: (sizes.append(tensor.numel()), tensor)[1],
            lambda tensor: tensor,
        ):
            trainer.fit()
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state.model.parameters(), lean.state.model.parameters(), strict=True)
    )
    assert sum(kept["lean"]) < 0.7 * sum(kept["plain"])


def test_best_is_higher_accuracy_then_lower_loss():
    progress = Progress(step=1)
    assert progress.improve({"top1": 0.5, "loss": 1.0})
    assert not progress.improve({"top1": 0.5, "loss": 1.1})
    progress.step = 2
    assert progress.improve({"top1": 0.5, "loss": 0.9})
    assert (progress.best_step, progress.best_loss) == (2, 0.9)
    assert not progress.improve({"top1": 0.4, "loss": 0.1})


def test_every():
    due = every_interval(2.5, 11)
    assert [step for step in range(12) if due(step)] == [3, 5, 8, 10, 11]
    assert [step for step in range(4) if every_interval(0.5, 3)(step)] == [1, 2, 3]


class Limited(torch.nn.Linear):
    """Has memory for so many images."""

    def __init__(self, limit):
        super().__init__(4, 2)
        self.limit = limit

    def forward(self, images):
        if len(images) > self.limit:
            raise torch.OutOfMemoryError
        return super().forward(images.flatten(1))


def test_the_micro_batch_is_halved_until_it_fits():
    fits = {
        limit: find_micro_batch_size(Limited(limit), (1, 2, 2), 100, Precision("fp32", CPU))
        for limit in (1, 12, 60, 100, 500)
    }
    assert fits == {1: 1, 12: 7, 60: 50, 100: 100, 500: 100}
    model = Limited(3)
    find_micro_batch_size(model, (1, 2, 2), 8, Precision("fp32", CPU))
    assert model.weight.grad is None
    with pytest.raises(torch.OutOfMemoryError):
        find_micro_batch_size(Limited(0), (1, 2, 2), 8, Precision("fp32", CPU))
