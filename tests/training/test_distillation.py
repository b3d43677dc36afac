"""What is learned of a teacher: the losses against their formulas, and the heads they reach."""

import copy

import pytest
import torch
from small_training import (
    BATCH_SIZE,
    CLASSES,
    CPU,
    FP32,
    assert_close,
    batch,
    make_model,
    make_state,
    make_step,
    mixed_batch,
    same_bits,
)
from torch import nn
from torch.nn.functional import one_hot

from vit.data.preprocessing import Preprocessing
from vit.runtime.precision import Precision
from vit.training.distillation import Distillation, build_teacher_loss
from vit.training.losses import build_loss
from vit.training.state import EMA
from vit.training.teacher import Teacher

PREPROCESSING = Preprocessing((8, 8), 3, (0.5,), (0.5,), None, "bilinear")


def random_logits(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=generator)


def make_teacher(dtype=torch.float32, **settings):
    """One that has an opinion: its head does not start at zero."""
    model = make_model(hidden_size=24, **settings)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    model.preprocessing = PREPROCESSING
    model.eval().requires_grad_(False)
    teacher = Teacher("teacher", "0" * 64, model, PREPROCESSING, None)
    teacher.model.to(dtype)
    return teacher


def make_distillation(kind, weight=0.5, temperature=3.0, loss="cross_entropy", **settings):
    of_teacher = build_teacher_loss(kind, loss, temperature)
    return Distillation(make_teacher(**settings), kind, of_teacher, weight)


def make_student(dtype=torch.float32, **settings):
    model = make_model(dtype, **settings)
    for number, head in enumerate((model.head, model.head_distill)):
        if head is not None:
            nn.init.normal_(head.weight, std=0.1, generator=torch.Generator().manual_seed(number))
    model.separate_heads = True
    return model


def step_of(state, distillation, **settings):
    step = make_step(state, **settings)
    step.distillation = distillation
    return step


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_soft_loss_is_hintons(temperature):
    """τ² KL(teacher ‖ student) of the softened probabilities, written out and as torch has it."""
    student, teacher = random_logits(0, 6, 4), random_logits(1, 6, 4)
    p, q = ((logits / temperature).softmax(1) for logits in (teacher, student))
    expected = temperature**2 * (p * (p.log() - q.log())).sum()
    loss = build_teacher_loss("soft", "cross_entropy", temperature)
    torch.testing.assert_close(loss(student, teacher), expected)

    of_torch = nn.KLDivLoss(reduction="sum")(q.log(), p) * temperature**2
    torch.testing.assert_close(loss(student, teacher), of_torch)
    assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-9)


def test_the_hard_loss_is_that_of_the_teachers_class_unsmoothed():
    student, teacher = random_logits(0, 6, 4), random_logits(1, 6, 4)
    classes = teacher.argmax(1)
    expected = -student.log_softmax(1)[torch.arange(6), classes].sum()
    loss = build_teacher_loss("hard", "cross_entropy", 3.0)
    torch.testing.assert_close(loss(student, teacher), expected)

    loss = build_teacher_loss("hard", "bce", 3.0)
    probabilities, labels = student.sigmoid(), one_hot(classes, 4)
    expected = -torch.where(labels == 1, probabilities.log(), (1 - probabilities).log()).mean(1)
    torch.testing.assert_close(loss(student, teacher), expected.sum())


def test_another_distillation_is_refused():
    with pytest.raises(ValueError, match=r"train\.distillation .*medium"):
        build_teacher_loss("medium", "cross_entropy", 3.0)


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("source", [batch, mixed_batch], ids=["labels", "mixed"])
def test_labels_and_teacher_share_the_loss(kind, heads, source):
    """(1 - λ) of the labels' on the class token's logits, λ of the teacher's on the other's."""
    targets = source(0)[1]
    taught = random_logits(1, BATCH_SIZE, len(CLASSES))
    own, others = (random_logits(seed, BATCH_SIZE, len(CLASSES)) for seed in (2, 3))
    logits = torch.stack([own, others], dim=1) if heads == 2 else own
    labels = build_loss("cross_entropy", 0.1)
    distillation = make_distillation(kind, weight=0.3)
    of_teacher = distillation.of_teacher(others if heads == 2 else own, taught)
    expected = 0.7 * labels(own, targets) + 0.3 * of_teacher
    torch.testing.assert_close(distillation.loss(labels, logits, targets, taught), expected)


def gradients_of_heads(kind, labels, teacher_seed):
    """The gradients of both heads' weights after one micro-batch."""
    model = make_student(distill_token=True)
    distillation = make_distillation(kind)
    head = distillation.teacher.model.head.weight
    nn.init.normal_(head, generator=torch.Generator().manual_seed(teacher_seed))
    step = step_of(make_state(model), distillation)
    step.accumulate_gradients(batch(0)[0], labels)
    assert model.head_distill is not None
    return model.head.weight.grad, model.head_distill.weight.grad


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_each_token_has_a_teacher_of_its_own(kind):
    """The class token's head learns from the labels alone, the other from the teacher alone."""
    labels = batch(0)[1]
    head, distilled = gradients_of_heads(kind, labels, teacher_seed=1)
    assert head.norm() > 0
    assert distilled.norm() > 0
    of_other_labels = gradients_of_heads(kind, labels.roll(1), teacher_seed=1)
    assert not torch.equal(of_other_labels[0], head)
    assert torch.equal(of_other_labels[1], distilled)
    of_other_teacher = gradients_of_heads(kind, labels, teacher_seed=2)
    assert torch.equal(of_other_teacher[0], head)
    assert not torch.equal(of_other_teacher[1], distilled)


@pytest.mark.parametrize(
    "settings",
    [{}, {"distill_token": True}, {"cls_token": False, "global_pool": "mean"}],
    ids=["token", "two tokens", "mean"],
)
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_step_is_that_of_the_formula(kind, settings):
    """In float64: loss and correct predictions of the row, and the gradient's norm."""
    model = make_student(torch.float64, **settings)
    distillation = make_distillation(kind, dtype=torch.float64)
    images, labels = batch(0)
    images = images.double()

    taught = distillation.teacher.model(images)
    logits = model(images)
    own, others = logits.unbind(1) if logits.ndim == 3 else (logits, logits)
    if kind == "soft":
        p, q = (taught / 3).softmax(1), (others / 3).softmax(1)
        of_teacher = 9 * (p * (p / q).log()).sum(1).mean()
    else:
        of_teacher = nn.functional.cross_entropy(others, taught.argmax(1))
    loss = 0.5 * nn.functional.cross_entropy(own, labels) + 0.5 * of_teacher
    norm = nn.utils.get_total_norm(torch.autograd.grad(loss, list(model.parameters())))
    correct = ((own + others).argmax(1) == labels).sum()

    row = step_of(make_state(model), distillation, micro_batch_size=5)(images, labels)
    torch.testing.assert_close(row, torch.stack([loss, correct.double(), norm]).detach())


def test_both_heads_are_averaged_where_nothing_is_learned():
    """In training with a teacher they are apart, in evaluation and without one they are not."""
    model = make_student(distill_token=True)
    images = batch(0)[0]
    apart = model(images)
    assert apart.shape == (BATCH_SIZE, 2, len(CLASSES))
    torch.testing.assert_close(model.eval()(images), apart.mean(1))
    model.separate_heads = False
    torch.testing.assert_close(model.train()(images), apart.mean(1))


@pytest.mark.parametrize("source", [batch, mixed_batch], ids=["labels", "mixed"])
def test_micro_batches_leave_the_result_as_it_is(source):
    models = []
    for size in (None, 3):
        model = make_student(torch.float64, distill_token=True, drop_path=0.3)
        distillation = make_distillation("soft", dtype=torch.float64)
        step = step_of(make_state(model), distillation, micro_batch_size=size)
        for number in range(3):
            images, targets = source(number)
            step(images.double(), targets)
        models.append(model)
    assert_close(*models, rtol=1e-9, atol=1e-12)


def test_the_teacher_sees_the_students_images_and_stays_as_it_is():
    """Without gradients and in evaluation mode, so that nothing in it is random."""
    distillation = make_distillation("soft", dropout=0.5, drop_path=0.5)
    teacher = distillation.teacher.model
    before = copy.deepcopy(teacher)
    seen = []
    teacher.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    step = step_of(make_state(make_student()), distillation, micro_batch_size=10)
    images, targets = mixed_batch(0)
    step(images, targets)

    assert [inputs.shape[0] for inputs, _ in seen] == [10, 6]
    assert torch.equal(torch.cat([inputs for inputs, _ in seen]), images)
    assert not any(output.requires_grad for _, output in seen)
    assert not any(module.training for module in teacher.modules())
    assert same_bits(teacher, before)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teacher_is_part_of_no_state():
    """Neither of the optimizer nor of the average nor of what a checkpoint holds."""
    model = make_student(distill_token=True)
    state = make_state(model)
    state.ema = EMA(model, 0.9)
    step = step_of(state, make_distillation("hard"))
    step(*batch(0))
    state.progress.step = 1
    names = {name.split("/", 1)[1] for name in state.tensors()}
    own = {name for name, _ in model.named_parameters()}
    assert {name.partition("/")[0] for name in names} == own
    assert sum(len(group["params"]) for group in state.optimizer.param_groups) == len(own)
    # The average is evaluated by the mean of both heads, as any other model
    assert state.ema.model(batch(0)[0]).shape == (BATCH_SIZE, len(CLASSES))


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_student_comes_to_agree_with_its_teacher(kind):
    """On images that it has not seen, of a teacher that has never heard of the labels."""
    agreements = []
    for distillation in (make_distillation(kind, weight=0.9), None):
        model = make_student()
        step = step_of(make_state(model), distillation)
        for number in range(60):
            step(*batch(number))
        images = batch(1000, size=200)[0]
        theirs = make_teacher().model(images).argmax(1)
        agreements.append((model.eval()(images).argmax(1) == theirs).float().mean().item())
    assert agreements[0] > agreements[1] + 0.2


def test_the_teacher_computes_in_the_students_precision():
    distillation = make_distillation("soft")
    types = []
    block = distillation.teacher.model.encoder.blocks[0]
    block.mlp.fc1.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    images = batch(0)[0]
    for precision in (FP32, Precision("bf16", CPU)):
        assert distillation.teach(images, precision).dtype == torch.float32
    assert types == [torch.float32, torch.bfloat16]
