"""Two processes of one run: one that falls silent without dying must not be waited for."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from faults.trials import Effort, Row, children, finish
from helpers import start, wait_until

from vit.checkpoints.run import PREVIOUS

RUN = [
    "experiment=digits",
    "model.num_layers=1",
    "train.steps=4000",
    "train.save_every=5",
    "train.log_every=1",
    "train.eval_every=1000",
    "runtime.processes=2",
]


def processes(work: Path, effort: Effort) -> Iterator[Row]:
    row = Row("one of two processes killed or stopped: all end within 60 s, resumable")
    if effort.quick:
        strike(work, signal.SIGSTOP, 1, row)
    else:
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for victim in (0, 1):
                strike(work, number, victim, row)
    yield row


def strike(work: Path, number: signal.Signals, victim: int, row: Row) -> None:
    """Send a signal to one rank, and resume what is left by one process."""
    folder = f"{number.name}_{victim}"
    process = start("train.py", *RUN, f"hydra.run.dir={folder}", cwd=work)
    wait_until((work / folder / "checkpoints" / PREVIOUS).exists, process)
    ranks = [pid for pid in children(process.pid) if is_rank(pid)]
    began = time.monotonic()
    os.kill(ranks[victim], number)
    _, errors = process.communicate(timeout=150)
    seconds = time.monotonic() - began
    good = process.returncode != 0 and seconds < 60 and f"rank {victim}" in errors
    code = process.returncode
    row.count(good, f"{folder}: exit code {code} after {seconds:.0f} s: {errors[-500:]}")

    arguments = [f"resume={folder}", "runtime.processes=1", "train.steps=1"]
    code, errors = finish(work, *arguments, "resume_changed=allow")
    refused = code == 2 and "train.steps" in errors
    row.count(refused, f"{folder} resumed: {code} {errors[-300:]}")


def is_rank(pid: int) -> bool:
    return "train.py" in Path(f"/proc/{pid}/cmdline").read_text()
