"""What the trainer must survive, tried for real: kills, damaged files, mistakes, hostile files, a
full disk, a lost worker.

    make test-faults                       # everything; one to two hours on two cores
    python tests/faults --quick            # the short form that `make test` runs too
    python tests/faults --only kills --out benchmarks/results/faults.md

Every row of the table is one fault: how often it was tried, and how often the trainer survived it.
The exit code is 1 where it did not; these cases are described below their row.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.suite import FAULTS, run_fault, table
from faults.trials import Effort, Row


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tests/faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=list(FAULTS), action="append")
    parser.add_argument("--out", type=Path, help="write the table here, as Markdown")
    parser.add_argument("--kills", type=int, default=100, help="of each kind of signal")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    effort = Effort(arguments.quick, arguments.kills)
    began = time.monotonic()
    rows: list[Row] = []
    for name in arguments.only or FAULTS:
        rows += run_fault(name, effort)
        text = table(rows, (time.monotonic() - began) / 60)
        if arguments.out:  # after each kind, so that none is lost
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(text + "\n")
    print("\n" + text)
    return 1 if any(row.failures for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
