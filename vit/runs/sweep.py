"""Sweeps: every job of `train.py -m` is a process and a folder of its own, and all of them end in
one ranked table.
"""

import contextlib
import csv
import ctypes
import fcntl
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vit.errors import ConfigError, Stopped
from vit.files import atomic_write, read_json, write_json, write_text
from vit.runs.folder import wait_until_free
from vit.text import markdown_table

TRAIN = Path(__file__).parents[2] / "train.py"
SECONDS_TO_LET_GO = (
    120  # how long a job of a driver that was killed may take to save and leave its folder
)
BARS_DRAWN = 40  # jobs at most in the picture
COLUMNS = ["job", "overrides", "val_top1", "test_top1", "status", "reason", "seconds"]
Row = dict[str, Any]


def run_job(folder: Path, overrides: list[str], jobs_at_once: int | None = None) -> float:
    """Train one job in a child process; its validation top-1, or NaN where it gave none, whatever
    became of it.

    A process of its own can crash, exit or run out of memory without taking the other jobs with it,
    and gives all its memory back. A signal is passed on to the child, which saves and ends; then
    Stopped is raised and no further job begins. Where the folder holds the same job from an earlier
    start of the sweep, it is left alone if it is finished, resumed if it has a checkpoint, and else
    begun anew.
    jobs_at_once: of this sweep on this machine, each with the GPU of its slot.
    Raises ConfigError where the folder holds another job.
    """
    folder.mkdir(parents=True, exist_ok=True)
    earlier = read_json(folder / "job.json").get("overrides")
    if earlier is not None and sorted(earlier) != sorted(overrides):
        raise ConfigError(
            f"{folder}: holds another job of an earlier sweep ({' '.join(earlier)}); "
            "give the sweep a folder of its own with hydra.sweep.dir=FOLDER"
        )
    finished = read_json(folder / "result.json").get("status") == "finished"
    if earlier is None or not finished:
        wait_until_free(folder, SECONDS_TO_LET_GO)
        # Of a start that failed; how this one ends is what counts
        (folder / "result.json").unlink(missing_ok=True)
        with job_slot(folder.parent, jobs_at_once) as slot:
            train_job(folder, overrides, slot)
    top1 = read_json(folder / "result.json").get("val_top1")
    return math.nan if top1 is None else top1


@contextlib.contextmanager
def job_slot(sweep_folder: Path, count: int | None) -> Iterator[int | None]:
    """One of `count` slots of a sweep by number, once one is free; None at once where count is
    None.

    Slots are locks of the kernel's, which end with their process, so that launchers which start all
    jobs at once (submitit_local) need not count.
    """
    if count is None:
        yield None
        return
    with contextlib.ExitStack() as stack:
        paths = [sweep_folder / f".place-{number}" for number in range(count)]
        locks = [stack.enter_context(open(path, "w")) for path in paths]
        while True:
            for number, lock in enumerate(locks):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    yield number
                    return
            time.sleep(0.5)


def train_job(folder: Path, overrides: list[str], gpu: int | None = None) -> None:
    """Run one job as a child process, and note how it ended in job.json.

    gpu: which of those that this process may use; None: all of them. Raises Stopped where a signal
    came meanwhile.
    """
    write_json(folder / "job.json", {"overrides": overrides, "status": "running"})
    resume = [] if any(item.startswith("resume=") for item in overrides) else ["resume=auto"]
    command = [sys.executable, str(TRAIN), *overrides, *resume, f"hydra.run.dir={folder}"]
    child = subprocess.Popen(
        command,
        env=environment_with_gpu(gpu),
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    exit_code, received = wait_passing_signals_on(child)
    ended = {"overrides": overrides, "status": "ended", "exit_code": exit_code}
    write_json(folder / "job.json", ended)
    if received is not None:
        raise Stopped(
            f"the sweep was stopped by {received.name} in job {folder.name}; resume it by the same "
            f"command and hydra.sweep.dir={folder.parent}"
        )


def environment_with_gpu(gpu: int | None) -> dict[str, str]:
    """The environment of a job that may use one of the GPUs of this process, by number."""
    environment = dict(os.environ)
    if gpu is not None:
        usable = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        chosen = str(gpu) if usable == [""] else usable[gpu % len(usable)]
        environment["CUDA_VISIBLE_DEVICES"] = chosen
    return environment


def end_with_parent() -> None:
    """In the child: get SIGTERM, which saves and ends, where the driver dies, however that happens
    (Linux only).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def wait_passing_signals_on(child: subprocess.Popen) -> tuple[int, signal.Signals | None]:
    """(the child's exit code, the first signal that was passed on to it)."""
    received: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        child.send_signal(number)

    handlers = {
        number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        exit_code = child.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return exit_code, signal.Signals(received[0]) if received else None


def collect(sweep_folder: Path) -> list[Row]:
    """One row a job, with the keys of COLUMNS: the best validation top-1 first, then those that
    have none.
    """
    rows = [job_row(note) for note in sweep_folder.glob("*/job.json")]
    rows.sort(
        key=lambda row: (row["val_top1"] is None, -(row["val_top1"] or 0), row["job"].zfill(8))
    )
    return rows


def job_row(note: Path) -> Row:
    """The row of the job that a job.json is of."""
    job, result = read_json(note), read_json(note.with_name("result.json"))
    status, reason = result.get("status"), result.get("reason", "")
    if status is None:
        code = job.get("exit_code")
        status = "running" if code is None else "crashed"
        reason = "" if code is None else describe_exit(code)
    return {
        "job": note.parent.name,
        "overrides": " ".join(job["overrides"]),
        "val_top1": result.get("val_top1"),
        "test_top1": result.get("test_top1"),
        "status": status,
        "reason": "" if status == "finished" else reason,
        "seconds": result.get("seconds"),
    }


def describe_exit(code: int) -> str:
    """Why a child that left no result.json ended, from its exit code."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        return f"signal {name}, as the system sends where memory runs out"
    return f"signal {name}"


def over_seeds(rows: list[Row]) -> list[Row]:
    """Where jobs differ in their seed alone, one row for all that finished, in the order of the
    first of them.

    Keys: overrides, seeds (how many), val_top1 and test_top1 as (mean, sample standard deviation),
    or None where a job has none.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        words = row["overrides"].split()
        without_seed = [word for word in words if not word.startswith("seed=")]
        if row["status"] == "finished" and len(without_seed) < len(words):
            groups.setdefault(" ".join(without_seed), []).append(row)
    return [
        {
            "overrides": overrides,
            "seeds": len(jobs),
            "val_top1": mean_and_deviation([job["val_top1"] for job in jobs]),
            "test_top1": mean_and_deviation([job["test_top1"] for job in jobs]),
        }
        for overrides, jobs in groups.items()
        if len(jobs) > 1
    ]


def mean_and_deviation(values: list[float | None]) -> tuple[float, float] | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return statistics.mean(known), statistics.stdev(known)


def table(rows: list[Row]) -> str:
    """The jobs, ranked, and below them the mean and standard deviation over seeds, where jobs
    differ in them alone.
    """
    cells = [["rank", "job", "val top-1", "test top-1", "status", "overrides"]]
    for rank, row in enumerate(rows, start=1):
        status = row["status"]
        if row["reason"]:
            status += f": {row['reason'].splitlines()[0]}"
        cells.append(
            [
                "" if row["val_top1"] is None else str(rank),
                row["job"],
                percent(row["val_top1"]),
                percent(row["test_top1"]),
                status,
                row["overrides"],
            ]
        )
    parts = [markdown_table(cells)]
    if rows and rows[0]["val_top1"] is not None:
        parts.append(f"best: python train.py {shlex.join(rows[0]['overrides'].split())}")
    groups = over_seeds(rows)
    if groups:
        parts += ["mean ± standard deviation over seeds", table_over_seeds(groups)]
    return "\n\n".join(parts)


def table_over_seeds(groups: list[Row]) -> str:
    cells = [["seeds", "val top-1", "test top-1", "overrides"]]
    for group in groups:
        accuracies = []
        for value in (group["val_top1"], group["test_top1"]):
            if value is None:
                accuracies.append("")
            else:
                mean, deviation = value
                accuracies.append(f"{100 * mean:.2f} ± {100 * deviation:.2f} %")
        cells.append([str(group["seeds"]), *accuracies, group["overrides"] or "(none)"])
    return markdown_table(cells)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def draw(rows: list[Row], path: Path) -> None:
    """A picture of the jobs that have a validation top-1, the best at the top: val as a bar, test
    as a mark.
    """
    from matplotlib.figure import (
        Figure,
    )  # takes a second, which the process that drives a sweep need not wait

    ranked = [row for row in rows if row["val_top1"] is not None][:BARS_DRAWN]
    if not ranked:
        return
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    heights = list(range(len(ranked), 0, -1))
    val = [100 * row["val_top1"] for row in ranked]
    axes.barh(heights, val, color="#8fb3d9", label="validation")
    tested = [
        (100 * row["test_top1"], height)
        for row, height in zip(ranked, heights, strict=True)
        if row["test_top1"] is not None
    ]
    if tested:
        x, y = zip(*tested, strict=True)
        axes.plot(x, y, "D", color="#1b3a5c", markersize=5, label="test")
    labels = [f"{row['job']}: {row['overrides'][-70:]}" for row in ranked]
    axes.set_yticks(heights, labels, fontsize=8)
    lowest = min(val + [value for value, _ in tested])
    axes.set_xlim(left=max(0.0, lowest - 5))
    axes.set_xlabel("top-1, %")
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)


def print_summary(folder: Path) -> None:
    """Write summary.md, summary.csv and summary.png into a sweep's folder and print the table."""
    rows = collect(folder)
    text = table(rows)
    write_text(folder / "summary.md", text + "\n")
    draw(rows, folder / "summary.png")
    with (
        atomic_write(folder / "summary.csv") as temporary,
        open(temporary, "w", newline="") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    finished = sum(row["status"] == "finished" for row in rows)
    count = f"{finished} of {len(rows)} jobs finished"
    print(f"\n{count}; the table is in {folder / 'summary.md'}\n\n{text}", flush=True)
