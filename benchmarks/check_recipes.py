"""Retrain three recipes, and fail where one is below its threshold: `make check-recipes`.

Digits whole, and cifar10_fast and cifar10_fast_conv cut to two epochs: a quarter of an hour on two
cores that multiply bf16 at 400 GFLOP/s. The thresholds are below every run that was measured
(benchmarks/README.md), by more than those differ among themselves, so a run below its threshold
means that something is broken. A run must also cost the training compute that is stated, or its
accuracy would be another recipe's.
"""

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

# The script is started by its path, and the repository is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.training_runs import ROOT, train_command
from vit.files import read_json


class Check(NamedTuple):
    """A run, the least value of a key of its result.json, and its training compute in PFLOPs."""

    name: str
    overrides: list[str]
    key: str
    threshold: float
    pflops: float


CUT = ["train.epochs=2", "data.val_fraction=0.1"]
CHECKS = [
    Check("digits", ["experiment=digits"], "test_top1", 0.965, 0.0020),
    Check("cifar10_fast, cut", ["experiment=cifar10_fast", *CUT], "val_top1", 0.74, 0.0967),
    Check(
        "cifar10_fast_conv, cut", ["experiment=cifar10_fast_conv", *CUT], "val_top1", 0.78, 0.1027
    ),
]


def verdict_on(check: Check, result: dict[str, Any]) -> tuple[bool, str]:
    """Return whether the result.json of a run passes its check, and a line about it."""
    value, pflops = result[check.key], result["pflops"]
    line = (
        f"{check.name}: {check.key} {value:.2%}, need {check.threshold:.2%}; "
        f"{pflops:.3g} PFLOP, stated {check.pflops:.3g}"
    )
    # One step more or less is rounding, another model or another number of epochs is not
    as_stated = math.isclose(pflops, check.pflops, rel_tol=0.03)
    passed = value >= check.threshold and as_stated
    return passed, f"{'ok    ' if passed else 'FAILED'}  {line}"


def run_check(check: Check, folder: Path) -> tuple[bool, str]:
    """Train in a run folder; return whether the check passed, and a line about it."""
    code = subprocess.run(train_command(check.overrides, folder), cwd=ROOT).returncode
    if code != 0:
        return False, f"FAILED  {check.name}: exit code {code}"
    return verdict_on(check, read_json(folder / "result.json"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "check_recipes" / now)
    out = parser.parse_args().out.resolve()

    results = [run_check(check, out / str(number)) for number, check in enumerate(CHECKS)]
    # After all, since a run prints far more than fits on a screen
    print()
    for _, line in results:
        print(line)
    return 0 if all(passed for passed, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
