"""Epochs and fractions as steps, schedules, and what is due when."""

import math

import pytest
from small_training import make_plan

from vit.errors import ConfigError
from vit.training.plan import Plan, build_schedule, due_every, duration_in_steps
from vit.training.state import Progress


def schedule(name, total_steps, warmup=0.0, final=None, cooldown=None, steps_per_epoch=10):
    return build_schedule(
        name=name,
        warmup=warmup,
        final=final,
        cooldown=cooldown,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
    )


def test_cosine():
    factor = schedule("cosine", 110, warmup=10, final=0.1)
    assert [factor(0), factor(5), factor(10)] == [0.0, 0.5, 1.0]
    assert factor(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1)


def test_linear():
    factor = schedule("linear", 100, warmup=0.1)
    assert [factor(step) for step in (5, 10, 55, 100)] == pytest.approx([0.5, 1.0, 0.5, 0.0])


def test_constant():
    factor = schedule("constant", 100)
    assert {factor(step) for step in range(101)} == {1.0}


def test_a_constant_rate_cools_down_at_the_end():
    factor = schedule("constant", 100, warmup=10, cooldown=0.2, final=0.5)
    assert [factor(5), factor(10), factor(80)] == [0.5, 1.0, 1.0]
    assert [factor(90), factor(100)] == pytest.approx([0.75, 0.5])


@pytest.mark.parametrize(
    ("value", "steps"), [(0.05, 50), (0, 0), (1, 1), (500, 500), ("5ep", 50), ("0.5ep", 5)]
)
def test_durations_are_fractions_steps_or_epochs(value, steps):
    assert duration_in_steps(value, total_steps=1000, steps_per_epoch=10) == steps
    factor = schedule("constant", 1000, cooldown=value)
    first_below = next((step for step in range(1001) if factor(step) < 1), 1001)
    assert first_below == 1000 - steps + 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": 100}, r"schedule\.warmup .*100"),
        ({"warmup": "10ep"}, r"schedule\.warmup .*100"),
        ({"warmup": 60, "cooldown": 0.5}, r"schedule\.warmup .*60 .*schedule\.cooldown .*50"),
        ({"warmup": "5 epochs"}, "5 epochs"),
    ],
)
def test_durations_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        schedule("constant", 100, **settings)


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="cosine, linear or constant, got step"):
        schedule("step", 10)


@pytest.mark.parametrize(
    ("interval", "total_steps", "steps"), [(2.5, 11, [3, 5, 8, 10, 11]), (0.5, 3, [1, 2, 3])]
)
def test_an_interval_need_not_be_whole(interval, total_steps, steps):
    due = [step for step in range(total_steps + 1) if due_every(interval, step, total_steps)]
    assert due == steps


def test_a_plan_says_what_is_due():
    plan = make_plan(10, log_every=4)  # two epochs of five steps
    steps = range(11)
    assert [step for step in steps if plan.evaluation_due(step)] == [5, 10]
    # A row of the log stands before every evaluation
    assert [step for step in steps if plan.log_due(step)] == [0, 4, 5, 8, 10]
    assert not any(plan.attention_due(step) for step in steps)
    assert plan.epochs == 2


def plan_with_patience(patience, eval_every=1.0):
    """Ten epochs of 2.5 steps."""
    return Plan(
        total_steps=25,
        steps_per_epoch=2.5,
        batch_size=8,
        schedule=lambda step: 1.0,
        eval_every=eval_every,
        attention_every=None,
        log_every=1,
        save_every=None,
        patience=patience,
    )


@pytest.mark.parametrize(
    ("patience", "step", "best_step", "over"),
    [
        (1, 3, 3, False),  # it has just improved
        (1, 5, 3, True),
        (2, 5, 3, False),
        (2, 8, 3, True),
        (3, 15, 8, True),  # evaluated at 8, 10, 13 and 15
        (4, 15, 8, False),
        (None, 25, 3, False),
    ],
)
def test_patience_counts_the_evaluations_since_the_best(patience, step, best_step, over):
    progress = Progress(step=step, evaluated_step=step, best_step=best_step)
    assert plan_with_patience(patience).out_of_patience(progress) == over


def test_patience_ends_nothing_between_two_evaluations():
    """A run that is resumed with a smaller patience makes its next evaluation first."""
    progress = Progress(step=9, evaluated_step=8, best_step=3)
    assert not plan_with_patience(1).out_of_patience(progress)
    assert not plan_with_patience(1).out_of_patience(Progress())


def test_patience_counts_one_evaluation_a_step_at_most():
    plan = plan_with_patience(2, eval_every=0.1)
    assert [plan.evaluations(step) for step in (0, 1, 2, 24, 25)] == [0, 1, 2, 24, 25]
    assert not plan.out_of_patience(Progress(step=2, evaluated_step=2, best_step=1))
    assert plan.out_of_patience(Progress(step=3, evaluated_step=3, best_step=1))


def test_a_plan_says_why_a_run_has_ended():
    plan = plan_with_patience(1)
    early = Progress(step=5, evaluated_step=5, best_step=3)
    assert plan.describe_end(early).startswith("train.patience=1: no improvement since step 3")
    last = Progress(step=25, evaluated_step=25, best_step=3)
    assert plan.describe_end(last) == "all steps done"
