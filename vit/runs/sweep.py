"""Sweeps: every job of `train.py -m` is a process and a folder of its own, and all of them end in one ranked table."""

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
from vit.files import read_json, write_json
from vit.runs.folder import wait_until_free
from vit.text import markdown_table

begun: list[Path] = []  # folders of the sweeps that this process drives


TRAIN = Path(__file__).parents[2] / "train.py"


SECONDS_TO_LET_GO = (
    120  # how long a job of a driver that was killed may take to save and leave its folder
)


def end_with_parent() -> None:
    """In the child: SIGTERM, which saves and ends, where the driver dies, however that happens (Linux alone has this)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def place(sweep_folder: Path, count: int) -> Iterator[int]:
    """One of so many places at work in a sweep, by number; waits until one is free. They are locks of the kernel's, which end
    with their process, so that launchers which start all jobs at once (submitit_local) need not count."""
    with contextlib.ExitStack() as stack:
        locks = [
            stack.enter_context(open(sweep_folder / f".place-{number}", "w"))
            for number in range(count)
        ]
        while True:
            for number, lock in enumerate(locks):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    yield number
                    return
            time.sleep(0.5)


def run_job(folder: Path, overrides: list[str], jobs_at_once: int | None = None) -> float:
    """Train one job in a child process; its validation top-1, or NaN where it gave none, whatever became of it.

    A process of its own can crash, leave or run out of memory without taking the other jobs with it, and gives all its
    memory back. A signal is passed on to the child, which saves and ends; then Stopped is raised and no further job begins.
    Where the folder holds the same job from an earlier start of the sweep: it is left if it is finished, gone on with if it
    has a checkpoint, and else begun anew. Raises ConfigError where the folder holds another job.
    jobs_at_once: of this sweep on this machine, each with the GPU of its place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    earlier = read_json(folder / "job.json").get("overrides")
    if earlier is not None and sorted(earlier) != sorted(overrides):
        raise ConfigError(
            f"{folder}: holds another job of an earlier sweep ({' '.join(earlier)}); give the sweep a folder of "
            "its own with hydra.sweep.dir=FOLDER"
        )
    result = read_json(folder / "result.json")
    if earlier is None or result.get("status") != "finished":
        wait_until_free(folder, SECONDS_TO_LET_GO)
        (folder / "result.json").unlink(
            missing_ok=True
        )  # of a start that failed; how this one ends is to be told
        with (
            contextlib.nullcontext()
            if jobs_at_once is None
            else place(folder.parent, jobs_at_once) as number
        ):
            train_job(folder, overrides, number)
        result = read_json(folder / "result.json")
    top1 = result.get("val_top1")
    return math.nan if top1 is None else top1


def train_job(folder: Path, overrides: list[str], gpu: int | None = None) -> None:
    """gpu: which of those that this process may use; None: all of them."""
    write_json(folder / "job.json", {"overrides": overrides, "status": "running"})
    received: list[int] = []
    resume = (
        [] if any(override.startswith("resume=") for override in overrides) else ["resume=auto"]
    )
    environment = dict(os.environ)
    if gpu is not None:
        usable = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = (
            usable[gpu % len(usable)] if usable != [""] else str(gpu)
        )
    child = subprocess.Popen(
        [sys.executable, str(TRAIN), *overrides, *resume, f"hydra.run.dir={folder}"],
        env=environment,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        exit_code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    write_json(
        folder / "job.json", {"overrides": overrides, "status": "ended", "exit_code": exit_code}
    )
    if received:
        raise Stopped(
            f"the sweep was stopped by {signal.Signals(received[0]).name} in job {folder.name}; go on with it by the "
            f"same command and hydra.sweep.dir={folder.parent}"
        )


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
            reason = "" if code is None else told_exit(code)
        rows.append(
            {
                "job": note.parent.name,
                "overrides": " ".join(job["overrides"]),
                "val_top1": result.get("val_top1"),
                "test_top1": result.get("test_top1"),
                "status": status,
                "reason": "" if status == "finished" else reason,
                "seconds": result.get("seconds"),
            }
        )
    rows.sort(
        key=lambda row: (row["val_top1"] is None, -(row["val_top1"] or 0), row["job"].zfill(8))
    )
    return rows


def told_exit(code: int) -> str:
    """Why a child that left no result.json ended, from its exit code."""
    if code >= 0:
        return f"exit code {code}"
    more = ", as the system does where memory runs out" if -code == signal.SIGKILL else ""
    return f"signal {signal.Signals(-code).name}{more}"


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where jobs differ in their seed alone, one row for all that finished (overrides, seeds, val_top1, test_top1), in the
    order of the first of them; the accuracies as (mean, standard deviation of a sample), or None where a job has none."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        words = row["overrides"].split()
        if row["status"] == "finished" and any(word.startswith("seed=") for word in words):
            groups.setdefault(
                " ".join(word for word in words if not word.startswith("seed=")), []
            ).append(row)

    def spread(jobs: list[dict[str, Any]], key: str) -> tuple[float, float] | None:
        values = [job[key] for job in jobs]
        return None if None in values else (statistics.mean(values), statistics.stdev(values))

    return [
        {
            "overrides": overrides,
            "seeds": len(jobs),
            **{key: spread(jobs, key) for key in ("val_top1", "test_top1")},
        }
        for overrides, jobs in groups.items()
        if len(jobs) > 1
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The jobs, ranked, and below them the mean and standard deviation over seeds, where jobs differ in the seed alone."""

    def told(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    cells = [["rank", "job", "val top-1", "test top-1", "status", "overrides"]]
    for rank, row in enumerate(rows, start=1):
        status = row["status"] + (f": {row['reason'].splitlines()[0]}" if row["reason"] else "")
        cells.append(
            [
                "" if row["val_top1"] is None else str(rank),
                row["job"],
                told(row["val_top1"]),
                told(row["test_top1"]),
                status,
                row["overrides"],
            ]
        )
    parts = [markdown_table(cells)]
    if rows and rows[0]["val_top1"] is not None:
        parts.append(f"best: python train.py {shlex.join(rows[0]['overrides'].split())}")
    groups = over_seeds(rows)
    if not groups:
        return "\n\n".join(parts)
    means = [["seeds", "val top-1", "test top-1", "overrides"]]
    for group in groups:
        spreads = [
            f"{100 * value[0]:.2f} ± {100 * value[1]:.2f} %" if value else ""
            for value in (group["val_top1"], group["test_top1"])
        ]
        means.append([str(group["seeds"]), *spreads, group["overrides"] or "(none)"])
    return "\n\n".join([*parts, "mean ± standard deviation over seeds", markdown_table(means)])


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A picture of the jobs that have a validation top-1, the best at the top: val filled, test as a mark."""
    from matplotlib.figure import Figure

    ranked = [row for row in rows if row["val_top1"] is not None][:40]
    if not ranked:
        return
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    places = range(len(ranked), 0, -1)
    axes.barh(
        places, [100 * row["val_top1"] for row in ranked], color="#8fb3d9", label="validation"
    )
    tested = [
        (100 * row["test_top1"], place)
        for row, place in zip(ranked, places, strict=True)
        if row["test_top1"] is not None
    ]
    if tested:
        axes.plot(*zip(*tested, strict=True), "D", color="#1b3a5c", markersize=5, label="test")
    axes.set_yticks(
        places, [f"{row['job']}: {row['overrides'][-70:]}" for row in ranked], fontsize=8
    )
    lowest = min([row["val_top1"] for row in ranked] + [value / 100 for value, _ in tested])
    axes.set_xlim(left=max(0.0, 100 * lowest - 5))
    axes.set_xlabel("top-1, %")
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)


def print_tables() -> None:
    """Write summary.md and summary.csv into every sweep begun here and print the table."""
    for folder in begun:
        rows = collect(folder)
        (folder / "summary.md").write_text(table(rows) + "\n")
        draw(rows, folder / "summary.png")
        with open(folder / "summary.csv", "w", newline="") as file:
            writer = csv.DictWriter(
                file, ["job", "overrides", "val_top1", "test_top1", "status", "reason", "seconds"]
            )
            writer.writeheader()
            writer.writerows(rows)
        finished = sum(row["status"] == "finished" for row in rows)
        print(
            f"\n{finished} of {len(rows)} jobs finished; the table is in {folder / 'summary.md'}\n\n{table(rows)}",
            flush=True,
        )
