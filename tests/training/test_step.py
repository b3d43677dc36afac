"""One optimizer step: micro-batches, dropout, stochastic depth, clipping, fp16's loss scale."""

import pytest
import torch
from small_training import (
    CPU,
    MadeUpBatches,
    assert_close,
    batch,
    make_model,
    make_state,
    make_step,
    make_trainer,
    mixed_batch,
    same_bits,
)

from vit.errors import TrainingFailed
from vit.runtime.precision import Precision
from vit.runtime.processes import Processes
from vit.training.losses import build_loss
from vit.training.state import EMA
from vit.training.step import draw_drop_path

FP16 = Precision("fp16", CPU)


@pytest.mark.parametrize(
    ("loss", "source"), [("cross_entropy", batch), ("bce", mixed_batch)], ids=["labels", "mixed"]
)
@pytest.mark.parametrize("size", [1, 5, 8, 16, 100])
def test_micro_batches_leave_the_result_as_it_is(tmp_path, size, loss, source):
    """With labels and with the classes' weights of mixed images."""
    whole, parts = (
        make_trainer(
            tmp_path / name,
            batches=MadeUpBatches(source=source),
            loss=build_loss(loss, 0.1),
            micro_batch_size=micro_batch_size,
        )
        for name, micro_batch_size in (("whole", None), ("parts", size))
    )
    whole.fit()
    parts.fit()
    assert_close(whole.state.model, parts.state.model, rtol=1e-4, atol=1e-6)


def test_drop_path_does_not_depend_on_the_micro_batches():
    rows = []
    models = []
    for micro_batch_size in (None, 3):
        state = make_state(make_model(torch.float64, drop_path=0.5))
        images, labels = batch(0)
        step = make_step(state, micro_batch_size=micro_batch_size)
        rows.append(step(images.double(), labels))
        models.append(state.model)
    torch.testing.assert_close(rows[0], rows[1])
    assert_close(models[0], models[1], rtol=1e-9, atol=1e-12)


def test_modules_are_gone_through_after_an_evaluation_alone(monkeypatch):
    model = make_model()
    calls = []
    train = model.train
    monkeypatch.setattr(model, "train", lambda mode=True: calls.append(mode) or train(mode))
    step = make_step(make_state(model))
    step(*batch(0))
    step(*batch(1))
    assert not calls
    model.eval()
    assert calls == [False]
    step(*batch(2))
    step(*batch(3))
    assert calls == [False, True]
    assert all(module.training for module in model.modules())


def test_the_row_holds_the_batchs_loss_hits_and_gradient_norm():
    model = make_model(torch.float64, init="trunc_normal", init_range=0.3)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    images, labels = batch(0)
    images = images.double()
    logits = model(images)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.nn.utils.get_total_norm(gradients)
    hits = (logits.argmax(1) == labels).sum()

    row = make_step(make_state(model), micro_batch_size=5, clip_norm=norm.item() / 2)(
        images, labels
    )
    torch.testing.assert_close(row, torch.stack([loss, hits.double(), norm]).detach())


def test_dropout_depends_on_the_step_alone(tmp_path):
    settings = {"dropout": 0.3, "attention_dropout": 0.2}
    first, second = (
        make_trainer(tmp_path / name, state=make_state(make_model(**settings)))
        for name in ("first", "second")
    )
    first.fit()
    torch.rand(17)  # the global generator stands elsewhere
    second.fit()
    assert same_bits(first.state.model, second.state.model)
    other = make_trainer(tmp_path / "other", state=make_state(make_model(**settings)), seed=1)
    other.fit()
    assert not same_bits(first.state.model, other.state.model)


def state_with_dropout():
    model = make_model(torch.float64, dropout=0.5)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return make_state(model, {"name": "sgd", "lr": 0.0, "weight_decay": 0.0})


def test_every_step_and_every_micro_batch_has_dropout_of_its_own():
    state = state_with_dropout()
    step = make_step(state, micro_batch_size=8)
    logits = []

    def forward(images, keep):
        logits.append(state.model(images, keep))
        return logits[-1]

    step.forward = forward
    images, labels = batch(0, 8)
    # The same images in both micro-batches of three steps, whose learning rate is 0
    images, labels = images.double().repeat(2, 1, 1, 1), labels.repeat(2)
    for number in (0, 1, 0):
        state.progress.step = number
        step(images, labels)
    assert torch.equal(logits[0], logits[4])
    assert torch.equal(logits[1], logits[5])
    different = logits[:4]
    for first in range(4):
        assert not any(torch.equal(different[first], other) for other in different[first + 1 :])


def test_a_process_computes_its_part_or_a_micro_batch_at_once():
    parts = [(None, 1), (4, 1), (None, 2), (4, 2), (12, 2)]
    steps = [
        make_step(make_state(), micro_batch_size=size, processes=Processes(count=count))
        for size, count in parts
    ]
    assert [step.images_at_once for step in steps] == [16, 4, 8, 4, 8]


def overflowing_state(**settings):
    """A state in fp16 whose loss scale is much too large."""
    state = make_state(precision=FP16, **settings)
    state.progress.scaler = {
        "scale": 2.0**40,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 0,
    }
    return state


def test_an_fp16_overflow_repeats_the_step_at_a_lower_scale(tmp_path):
    state = overflowing_state()
    steps_of_average = []
    state.ema = EMA(state.model, 0.9)
    state.ema.update = lambda model, step: steps_of_average.append(step)
    make_trainer(tmp_path / "fp16", state=state).fit()
    assert state.progress.scaler["scale"] < 2.0**30
    assert steps_of_average == list(range(6))
    reference = make_trainer(tmp_path / "fp32")
    reference.fit()
    assert_close(state.model, reference.state.model, rtol=0.05, atol=3e-3)


def test_fp16_gradients_that_are_finite_at_no_scale_end_the_run():
    state = make_state(precision=FP16)
    step = make_step(state)
    # The loss is finite, its gradient is not: as sqrt at 0
    step.loss = lambda logits, targets: (0 * logits).sqrt().sum()
    images, labels = batch(0)
    before = [parameter.clone() for parameter in state.model.parameters()]
    with pytest.raises(TrainingFailed, match=r"step 1 .*train\.precision"):
        step(images, labels)
    assert all(map(torch.equal, before, state.model.parameters()))


def sizes_kept_for_backward(trainer):
    """How many numbers each tensor has that training keeps for its backward passes."""
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.fit()
    return sizes


def test_checkpointed_activations_leave_the_result_as_it_is(tmp_path):
    plain, lean = (
        make_trainer(tmp_path / name, state=make_state(make_model(dropout=0.3, drop_path=0.3)))
        for name in ("plain", "lean")
    )
    lean.state.model.encoder.checkpointing = True
    kept, kept_by_lean = (sizes_kept_for_backward(trainer) for trainer in (plain, lean))
    assert same_bits(plain.state.model, lean.state.model)
    assert sum(kept_by_lean) < 0.7 * sum(kept)


def test_drop_path_rises_or_is_constant():
    rising, constant = (
        draw_drop_path(0.5, 5, 4000, 0, 0, schedule) for schedule in ("linear", "constant")
    )
    dropped = (rising == 0).float().mean((0, 2)).tolist()
    assert dropped == pytest.approx([0, 0.125, 0.25, 0.375, 0.5], abs=0.02)
    dropped = (constant == 0).float().mean((0, 2)).tolist()
    assert dropped == pytest.approx([0.5] * 5, abs=0.02)
    assert set(constant.unique().tolist()) == {0.0, 2.0}
    assert rising.mean((0, 2)).tolist() == pytest.approx([1.0] * 5, abs=0.03)
    assert draw_drop_path(0.0, 5, 10, 0, 0) is None


def test_drop_path_factors_are_scaled_and_belong_to_the_step_and_the_image():
    keep = draw_drop_path(0.4, 5, 4000, seed=1, step=7)
    assert keep.shape == (4000, 5, 2)
    rates = torch.linspace(0, 0.4, 5).tolist()
    assert (keep == 0).float().mean((0, 2)).tolist() == pytest.approx(rates, abs=0.02)
    for layer, rate in enumerate(rates):
        factors = [0.0, 1 / (1 - rate)] if rate else [1.0]
        assert keep[:, layer].unique().tolist() == pytest.approx(factors)
    assert torch.equal(keep[:64], draw_drop_path(0.4, 5, 64, seed=1, step=7))
    assert not torch.equal(keep, draw_drop_path(0.4, 5, 4000, seed=1, step=8))
