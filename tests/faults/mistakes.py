"""Mistakes by the hundred: exit code 2 and one line that names the key or the path."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

from faults.configurations import Case, configurations
from faults.inputs import checkpoints, data_sets
from faults.trials import Effort, Row, finish
from helpers import ROOT

PLANTED_BUG = """
import vit.evaluation.accuracy as accuracy

def broken(*arguments):
    raise KeyError("planted")

accuracy.evaluate = broken
"""


def mistakes(work: Path, effort: Effort) -> Iterator[Row]:
    dice = random.Random(2)
    for title, cases in (
        ("mistaken configurations", list(configurations())),
        ("data sets and images", list(data_sets(work))),
        ("checkpoints and weights", list(checkpoints(work))),
    ):
        row = Row(f"{title}: exit 2, named in one line, no traceback")
        for case in dice.sample(cases, 8) if effort.quick else cases:
            try_case(work, case, row)
        yield row
    if not effort.quick:  # tests/command_line has both
        yield answered_at_once(work)
        yield planted_bug(work)


def try_case(work: Path, case: Case, row: Row) -> None:
    code, errors = finish(work, *case.arguments, program=case.script)
    lines = [line for line in errors.splitlines() if line.strip() and "Warning" not in line]
    good = code == 2 and "Traceback" not in errors and len(lines) == 1 and case.named in errors
    command = f"{case.script} {' '.join(case.arguments[-3:])}"
    row.count(good, f"{command}: exit code {code}, {errors[-400:]!r} should name {case.named}")


def answered_at_once(work: Path) -> Row:
    row = Row("a mistaken configuration is reported within 3 s, Python's start included")
    for argument in ("optimizer.lrr=1", "model=vit_b17", "optimizer.lr=-1", "train.epochs=0"):
        began = time.monotonic()
        code, _ = finish(work, argument, from_scratch=True)
        seconds = time.monotonic() - began
        row.count(code == 2 and seconds < 3, f"{argument}: {seconds:.1f} s, exit code {code}")
    return row


def planted_bug(work: Path) -> Row:
    row = Row("a planted bug shows its traceback, exit 1")
    (work / "sitecustomize.py").write_text(PLANTED_BUG)
    environment = {"PYTHONPATH": f"{work}:{ROOT}"}
    arguments = ["experiment=digits", "train.steps=1", "hydra.run.dir=bug"]
    code, errors = finish(work, *arguments, env=environment)
    shown = "Traceback" in errors and "KeyError: 'planted'" in errors
    row.count(code == 1 and shown, errors[-300:])
    return row
