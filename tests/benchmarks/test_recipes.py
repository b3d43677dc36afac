"""benchmarks/recipes.py in miniature."""

import re
import subprocess
from types import SimpleNamespace

import pytest
from helpers import TINY, read_result, start

from benchmarks import recipes

SEEDS = (0, 1)
OPTIONS = [*TINY[1:], "train.epochs=2", "runtime.threads=1"]


@pytest.fixture
def run_recipes(tmp_path, monkeypatch, capsys):
    """A function that runs digits for so many minutes; returns the exit code and the output."""

    def start_forked(command: list[str], cwd):
        _, script, *arguments = command
        return start(script, *arguments, cwd=cwd, stdout=subprocess.DEVNULL)

    def run(minutes: float) -> tuple[int, str]:
        options = f"digits --seeds {len(SEEDS)} --out {tmp_path} --minutes {minutes} --"
        monkeypatch.setattr("sys.argv", ["recipes.py", *options.split(), *OPTIONS])
        return recipes.main(), capsys.readouterr().out

    forking = SimpleNamespace(Popen=start_forked, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(recipes, "subprocess", forking)
    return run


@pytest.mark.slow
def test_recipes_are_run_in_pieces_into_one_table(run_recipes, tmp_path):
    """Stopped when its time is over, resumed, and then nothing is left to do."""
    assert run_recipes(minutes=0.001)[0] == 75
    code, output = run_recipes(minutes=5)
    assert code == 0, output
    results = [read_result(tmp_path / "digits" / f"seed_{seed}") for seed in SEEDS]
    mean = 100 * sum(result["test_top1"] for result in results) / len(SEEDS)
    assert re.search(rf"\| digits \| 2 \| \d+\.\d\d ± \d+\.\d\d \| {mean:.2f} ± ", output)
    code, output = run_recipes(minutes=5)
    assert code == 0
    assert "all runs are done" in output
