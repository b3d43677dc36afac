"""Sweeps: every job of `train.py -m` is a process and a folder of its own, and all of them end in one ranked table."""

import csv
import json
import math
import signal
import statistics
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
    """One row a job (job, overrides, val_top1, test_top1, status, reason, seconds): the best validation top-1 first, then those
    that have none."""
    rows = []
    for note in sweep_folder.glob("*/job.json"):
        job, result = read_json(note), read_json(note.with_name("result.json"))
        status, reason = result.get("status"), result.get("reason", "")
        if status is None:
            code = job.get("exit_code")
            status = "running" if code is None else "crashed"
            reason = "" if code is None else f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        rows.append({"job": note.parent.name, "overrides": " ".join(job["overrides"]), "val_top1": result.get("val_top1"),
                     "test_top1": result.get("test_top1"), "status": status,
                     "reason": "" if status == "finished" else reason, "seconds": result.get("seconds")})
    rows.sort(key=lambda row: (row["val_top1"] is None, -(row["val_top1"] or 0), row["job"].zfill(8)))
    return rows


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where jobs differ in their seed alone, one row for all that finished (overrides, seeds, val_top1, test_top1), in the
    order of the first of them; the accuracies as (mean, standard deviation of a sample), or None where a job has none."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        words = row["overrides"].split()
        if row["status"] == "finished" and any(word.startswith("seed=") for word in words):
            groups.setdefault(" ".join(word for word in words if not word.startswith("seed=")), []).append(row)

    def spread(jobs: list[dict[str, Any]], key: str) -> tuple[float, float] | None:
        values = [job[key] for job in jobs]
        return None if None in values else (statistics.mean(values), statistics.stdev(values))

    return [{"overrides": overrides, "seeds": len(jobs), **{key: spread(jobs, key) for key in ("val_top1", "test_top1")}}
            for overrides, jobs in groups.items() if len(jobs) > 1]


def markdown(cells: list[list[str]]) -> str:
    """A Markdown table, the first row its head, that reads well on a screen too."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def table(rows: list[dict[str, Any]]) -> str:
    """The jobs, ranked, and below them the mean and standard deviation over seeds, where jobs differ in the seed alone."""
    def told(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    cells = [["rank", "job", "val top-1", "test top-1", "status", "overrides"]]
    for rank, row in enumerate(rows, start=1):
        status = row["status"] + (f": {row['reason'].splitlines()[0]}" if row["reason"] else "")
        cells.append(["" if row["val_top1"] is None else str(rank), row["job"], told(row["val_top1"]), told(row["test_top1"]),
                      status, row["overrides"]])
    groups = over_seeds(rows)
    if not groups:
        return markdown(cells)
    means = [["seeds", "val top-1", "test top-1", "overrides"]]
    for group in groups:
        spreads = [f"{100 * value[0]:.2f} ± {100 * value[1]:.2f} %" if value else ""
                   for value in (group["val_top1"], group["test_top1"])]
        means.append([str(group["seeds"]), *spreads, group["overrides"] or "(none)"])
    return f"{markdown(cells)}\n\nmean ± standard deviation over seeds\n\n{markdown(means)}"


def print_tables() -> None:
    """Write summary.md and summary.csv into every sweep begun here and print the table."""
    for folder in begun:
        rows = collect(folder)
        (folder / "summary.md").write_text(table(rows) + "\n")
        with open(folder / "summary.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["job", "overrides", "val_top1", "test_top1", "status", "reason", "seconds"])
            writer.writeheader()
            writer.writerows(rows)
        finished = sum(row["status"] == "finished" for row in rows)
        print(f"\n{finished} of {len(rows)} jobs finished; the table is in {folder / 'summary.md'}\n\n{table(rows)}",
              flush=True)
