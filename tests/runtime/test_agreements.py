"""What two processes agree on, though their clocks, memories and signals differ."""

import json
from pathlib import Path

import pytest
from several_processes import finish_ranks, start_ranks
from small_training import make_plan, make_trainer

from vit.files import read_json
from vit.training.agreement import Agreement

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("agreements")
    finish_ranks(start_ranks(2, "tests/runtime/agreements.py", str(folder), cwd=folder))
    return folder


def both(folder: Path, key: str):
    """What both processes came to, which is the same."""
    first, second = (read_json(folder / f"{rank}.json")[key] for rank in (0, 1))
    assert first == second
    return first


def test_they_take_the_micro_batch_that_fits_into_the_smaller_memory(folder):
    assert both(folder, "micro batches") == {
        # Images that fit into the memory of each, with 6 and 8 in their parts: what both take
        "16, 4": 4,
        "4, 16": 3,
        "16, 16": None,
        "5, 3": 2,
        "0, 16": "OutOfMemoryError",
        "16, 0": "OutOfMemoryError",
    }


def test_they_look_at_each_other_and_add_up_their_losses_seldom(folder, tmp_path):
    whole = both(folder, "whole")
    assert whole["step"] == 60
    # Before the first step, after it, then every ten, where steps are short; a busy machine makes
    # some of them long
    assert 7 <= whole["looks"] <= 20
    # Where they are logged, evaluated or saved, every twenty steps; and where they are shown
    assert 3 <= whole["sums"] <= 8

    alone = make_trainer(tmp_path, plan=make_plan(60, log_every=20))
    alone.fit()
    logs = [tmp_path / "metrics.jsonl", folder / "whole" / "0" / "metrics.jsonl"]
    expected, rows = ([json.loads(line) for line in log.read_text().splitlines()] for log in logs)
    assert len(rows) == len(expected)
    for row, expected_row in zip(rows, expected, strict=True):
        assert row.keys() == expected_row.keys()
        assert (row["split"], row["step"]) == (expected_row["split"], expected_row["step"])
        # Sums in another order: 2e-6 apart at step 20, up to 1e-2 at step 60, where the loss is a
        # hundredth of what it was
        for key in ("loss", "top1", "grad_norm"):
            assert row[key] == pytest.approx(expected_row[key], rel=2e-2)


def test_a_signal_to_one_stops_both_after_the_same_step(folder):
    assert 25 <= both(folder, "stopped")["stopped after"] <= 35


def test_a_loss_that_is_not_a_number_ends_both_at_once(folder):
    """Also where the clock of one alone lets it look."""
    message, _, seen = both(folder, "diverging").rpartition(", seen after ")
    assert "nan at step 25" in message
    assert 25 <= int(seen) <= 35


class OneOfTwo:
    """Stands in for Processes: the other one's steps take so many seconds."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def largest(self, *numbers: float) -> list[float]:
        *flags, seconds = numbers
        return [*flags, max(seconds, self.seconds)]


@pytest.mark.parametrize(("seconds", "interval"), [(0.001, 10), (0.3, 3), (0.9, 1), (60.0, 1)])
def test_slow_steps_are_looked_at_more_often(seconds, interval):
    agreement = Agreement(OneOfTwo(seconds))  # pyright: ignore[reportArgumentType]
    nothing = {"stopping": False, "saving": False, "showing": False}
    assert agreement.is_due(5)
    agreement.look(5, **nothing)
    assert agreement.is_due(6)
    agreement.look(6, **{**nothing, "saving": True})
    assert agreement.saving
    assert not agreement.stopping
    assert [agreement.is_due(6 + steps) for steps in (interval - 1, interval)] == [False, True]
