"""What `make check-recipes` lets pass, and that the stated compute is that of the recipes."""

import pytest
from composing import configured

from benchmarks.check_recipes import CHECKS, Check, verdict_on
from vit.training.prepare import training_flops_of

CHECK = Check("a recipe", [], "val_top1", 0.7, 0.1)


@pytest.mark.parametrize(
    ("top1", "pflops", "passes"),
    [(0.70, 0.1, True), (0.75, 0.101, True), (0.69, 0.1, False), (0.75, 0.11, False)],
)
def test_a_run_needs_the_accuracy_and_the_compute(top1, pflops, passes):
    passed, line = verdict_on(CHECK, {"val_top1": top1, "pflops": pflops})
    assert passed == passes
    assert line.startswith("ok" if passes else "FAILED")
    assert f"{top1:.2%}" in line


@pytest.mark.parametrize("check", [item for item in CHECKS if "cifar10" in item.overrides[0]])
def test_the_stated_compute_is_that_of_the_recipe(check):
    config = configured(*check.overrides)
    images = 50_000 * (1 - config.data.val_fraction) * config.train.epochs
    assert images * training_flops_of(config, 10) / 1e15 == pytest.approx(check.pflops, rel=0.01)
