"""Retrain two recipes, and fail where one is below its threshold: `make check-recipes`.

About a quarter of an hour on two cores: digits whole, and cifar10_fast cut to ten minutes. The
thresholds are below every run that was measured (benchmarks/README.md), by more than those differ
among themselves, so a run below its threshold means that something is broken.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

# The script is started by its path, and the repository is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.training_runs import ROOT, train_command
from vit.files import read_json


class Check(NamedTuple):
    """A run, and the least value of a key of its result.json."""

    name: str
    overrides: list[str]
    key: str
    threshold: float


CHECKS = [
    Check("digits", ["experiment=digits"], "test_top1", 0.965),
    Check(
        "cifar10_fast, cut",
        ["experiment=cifar10_fast", "train.epochs=2", "data.val_fraction=0.1"],
        "val_top1",
        0.66,
    ),
]


def run_check(check: Check, folder: Path) -> tuple[bool, str]:
    """Train in a run folder; return whether the check passed, and a line about it."""
    code = subprocess.run(train_command(check.overrides, folder), cwd=ROOT).returncode
    if code != 0:
        return False, f"FAILED  {check.name}: exit code {code}"
    value = read_json(folder / "result.json")[check.key]
    passed = value >= check.threshold
    verdict = "ok    " if passed else "FAILED"
    return passed, f"{verdict}  {check.name}: {check.key} {value:.2%}, need {check.threshold:.2%}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "check_recipes" / now)
    out = parser.parse_args().out.resolve()

    results = [run_check(check, out / str(number)) for number, check in enumerate(CHECKS)]
    # After both, since a run prints far more than fits on a screen
    print()
    for _, line in results:
        print(line)
    return 0 if all(passed for passed, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
