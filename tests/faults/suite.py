"""All kinds of faults by name, and their table."""

import contextlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from faults.damage import damage
from faults.hostile import hostile
from faults.kills import kills
from faults.machine import machine
from faults.mistakes import mistakes
from faults.processes import processes
from faults.sweeps import sweeps
from faults.trials import Effort, Row

FAULTS: dict[str, Callable[[Path, Effort], Iterator[Row]]] = {
    "kills": kills,
    "damage": damage,
    "mistakes": mistakes,
    "hostile": hostile,
    "machine": machine,
    "sweeps": sweeps,
    "processes": processes,
}
SHOWN_FAILURES = 20


def run_fault(name: str, effort: Effort) -> list[Row]:
    """Try all faults of a kind, in a folder that is removed, and print each row as it is known."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="faults ") as work:
        for row in FAULTS[name](Path(work), effort):
            print(f"{row.survived:5} of {row.tried:5}  {row.fault}", flush=True)
            for failure in row.failures[:SHOWN_FAILURES]:
                print(f"        {failure}", flush=True)
            rows.append(row)
    return rows


def table(rows: list[Row], minutes: float) -> str:
    """The rows as Markdown, with the time they took and where."""
    lines = [f"| {row.fault} | {row.tried} | {row.survived} |" for row in rows]
    footer = f"{minutes:.0f} minutes, {time.strftime('%Y-%m-%d')}, {machine_name()}"
    return "\n".join(["| fault | tried | survived |", "|---|---|---|", *lines, "", footer])


def machine_name() -> str:
    version = f"torch {torch.__version__}"
    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if names:
            return f"{len(names)} cores of {names[0]}, {version}"
    return version
