"""Retrains two recipes and fails where one falls below its threshold: `make check-recipes`, about a quarter of an hour.

digits whole, and a cut of cifar10_fast to ten minutes of 2 cores. The thresholds stand below every run measured
(benchmarks/README.md), by more than those differ among themselves: what falls below has been broken.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

# (name, overrides, key of result.json, least allowed)
CHECKS = [
    ("digits", ["experiment=digits"], "test_top1", 0.94),
    (
        "cifar10_fast, cut",
        ["experiment=cifar10_fast", "train.epochs=2", "data.val_fraction=0.1"],
        "val_top1",
        0.66,
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "outputs" / "check_recipes" / time.strftime("%Y-%m-%d_%H-%M-%S"),
    )
    out = parser.parse_args().out.resolve()
    fallen, lines = 0, []
    for number, (name, overrides, key, least) in enumerate(CHECKS):
        folder = out / str(number)
        code = subprocess.run(
            [sys.executable, "train.py", *overrides, f"hydra.run.dir={folder}"], cwd=ROOT
        ).returncode
        value = json.loads((folder / "result.json").read_text())[key] if code == 0 else None
        good = value is not None and value >= least
        fallen += not good
        told = (
            f"exit code {code}"
            if value is None
            else f"{key} {value:.2%}, at least {least:.2%} asked for"
        )
        lines.append(f"{'ok    ' if good else 'FALLEN'}  {name}: {told}")
    print("\n" + "\n".join(lines))
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
