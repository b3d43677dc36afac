"""Sweeps: every job of `train.py -m` is a process and a folder of its own, and all of them end in one ranked table."""

import csv
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from vit.errors import Stopped
from vit.run_folder import write_json

begun: list[Path] = []  # folders of the sweeps whose jobs this process has started


def run_job(folder: Path, sweep_folder: Path, overrides: list[str]) -> float:
    """Train one job in a child process; its validation top-1, or NaN where it gave none, whatever became of it.

    A process of its own can crash, leave or run out of memory without taking the other jobs with it, and gives all its
    memory back. A signal is passed on to the child, which saves and ends; then Stopped is raised and no further job begins.
    """
    if sweep_folder not in begun:
        begun.append(sweep_folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "job.json", {"overrides": overrides, "status": "running"})
    received: list[int] = []
    child = subprocess.Popen([sys.executable, sys.argv[0], *overrides, f"hydra.run.dir={folder}"], start_new_session=True)

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        exit_code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    write_json(folder / "job.json", {"overrides": overrides, "status": "ended", "exit_code": exit_code})
    if received:
        raise Stopped(f"the sweep was stopped by {signal.Signals(received[0]).name} in job {folder.name}")
    top1 = read_json(folder / "result.json").get("val_top1")
    return math.nan if top1 is None else top1


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def collect(sweep_folder: Path) -> list[dict[str, Any]]:
    """One row a job (job, overrides, val_top1, status, reason, seconds): the best validation top-1 first, then those that
    have none."""
    rows = []
    for note in sweep_folder.glob("*/job.json"):
        job, result = read_json(note), read_json(note.with_name("result.json"))
        status, reason = result.get("status"), result.get("reason", "")
        if status is None:
            code = job.get("exit_code")
            status = "running" if code is None else "crashed"
            reason = "" if code is None else f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        rows.append({"job": note.parent.name, "overrides": " ".join(job["overrides"]), "val_top1": result.get("val_top1"),
                     "status": status, "reason": "" if status == "finished" else reason, "seconds": result.get("seconds")})
    rows.sort(key=lambda row: (row["val_top1"] is None, -(row["val_top1"] or 0), row["job"].zfill(8)))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table that reads well on a screen too."""
    cells = [["rank", "job", "val top-1", "status", "overrides"]]
    for rank, row in enumerate(rows, start=1):
        has_value = row["val_top1"] is not None
        status = row["status"] + (f": {row['reason'].splitlines()[0]}" if row["reason"] else "")
        cells.append([str(rank) if has_value else "", row["job"], f"{row['val_top1']:.2%}" if has_value else "", status,
                      row["overrides"]])
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def print_tables() -> None:
    """Write summary.md and summary.csv into every sweep begun here and print the table."""
    for folder in begun:
        rows = collect(folder)
        (folder / "summary.md").write_text(table(rows) + "\n")
        with open(folder / "summary.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["job", "overrides", "val_top1", "status", "reason", "seconds"])
            writer.writeheader()
            writer.writerows(rows)
        finished = sum(row["status"] == "finished" for row in rows)
        print(f"\n{finished} of {len(rows)} jobs finished; the table is in {folder / 'summary.md'}\n\n{table(rows)}",
              flush=True)
