"""Sweeps: each job of `train.py -m` has its own process and folder, and one table ranks them all.

Hydra's basic launcher would run all jobs in one process, where a crash ends the whole sweep and
memory is not given back.
"""

import contextlib
import csv
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vit.errors import ConfigError, Stopped
from vit.files import atomic_write, lock, read_json, write_json, write_text
from vit.runs.folder import wait_until_free
from vit.runs.selection import CRITERIA, describe_value, score, score_of
from vit.runtime.launch import end_with_parent
from vit.text import markdown_table, shorten

TRAIN = Path(__file__).parents[2] / "train.py"
# How long a job, whose driver was killed, may take to save and release its folder
SECONDS_TO_LET_GO = 120
# Characters of a reason below the table
MAX_REASON = 200
# Jobs at most in the figure
BARS_DRAWN = 40
# Of the whole sweep: they mean nothing to one of its jobs
SETTINGS_OF_SWEEPS = ("search=", "+search=", "jobs_at_once=")
# Where the process that drives a sweep leaves what CUDA_VISIBLE_DEVICES was, for its jobs
VISIBLE_TO_THE_SWEEP = "VIT_VISIBLE_DEVICES"
ALL_GPUS = "all"
COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
MEASURED = [f"{split}_{name}" for name in CRITERIA for split in ("val", "test")]
COLUMNS = ["job", "overrides", "select", *MEASURED, "status", "reason", "seconds"]
Row = dict[str, Any]


def run_job(folder: Path, overrides: list[str], jobs_at_once: int | None = None) -> float:
    """Train one job in a child process, and return what is maximized, or NaN where it has none.

    That is the number of the validation split that train.select names, of the loss its negative.

    Where the folder holds the same job from an earlier start of the sweep, the job is left alone if
    it is finished, resumed if it has a checkpoint, and else started over. jobs_at_once: of this
    sweep on this machine, each with its part of the GPUs.

    A job that fails raises nothing, so that the other jobs are run. Raises Stopped on a signal,
    which was passed on to the child so that it could save, and ConfigError where the folder holds
    another job.
    """
    folder.mkdir(parents=True, exist_ok=True)

    # Jobs are numbered: another sweep into the same folder would resume jobs of other settings
    earlier = read_json(folder / "job.json").get("overrides")
    if earlier is not None and sorted(job_settings(earlier)) != sorted(job_settings(overrides)):
        raise ConfigError(
            f"{folder}: holds another job of an earlier sweep ({' '.join(earlier)}); "
            "give the sweep a folder of its own with hydra.sweep.dir=FOLDER"
        )

    finished = read_json(folder / "result.json").get("status") == "finished"
    if earlier is None or not finished:
        wait_until_free(folder, SECONDS_TO_LET_GO)
        # That of an earlier start must not be taken for the result of this one
        (folder / "result.json").unlink(missing_ok=True)
        with job_slot(folder.parent, jobs_at_once) as slot:
            gpus = [] if slot is None or jobs_at_once is None else gpus_of_slot(slot, jobs_at_once)
            train_job(folder, overrides, gpus)

    # NaN tells a sweeper that the job failed, without ending the sweep
    value = score_of(read_json(folder / "result.json"))
    return math.nan if value is None else value


def job_settings(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that make a job what it is, without those of the whole sweep."""
    return [item for item in overrides if not item.startswith(SETTINGS_OF_SWEEPS)]


@contextlib.contextmanager
def job_slot(sweep_folder: Path, count: int | None) -> Iterator[int | None]:
    """Wait for one of `count` slots of a sweep, and give its number; None where count is None.

    It limits how many jobs run at once under launchers that start all of them (submitit_local).
    """
    if count is None:
        yield None
        return

    # Locks of the kernel, which end with their process, so that no crash can leave a slot taken
    with contextlib.ExitStack() as stack:
        paths = [sweep_folder / f".place-{number}" for number in range(count)]
        files = [stack.enter_context(open(path, "w")) for path in paths]
        while True:
            for number, file in enumerate(files):
                with contextlib.suppress(BlockingIOError):
                    if not lock(file):
                        raise ConfigError(
                            f"jobs_at_once={count}: the file system of {sweep_folder} has no locks "
                            "to count jobs by; give another with hydra.sweep.dir=FOLDER"
                        )
                    yield number
                    return
            time.sleep(0.5)


def gpus_of_slot(slot: int, slots: int) -> list[str]:
    """Return which GPUs a job may use, so that jobs at once share them out: [] where there is none.

    Each of `slots` jobs gets as many; where there are fewer GPUs than jobs, jobs share one.
    """
    gpus = visible_gpus()
    if not gpus:
        return []
    each = max(1, len(gpus) // slots)
    first = slot * each % len(gpus)
    return gpus[first : first + each]


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ALL_GPUS)
    # The local launcher of submitit hides all GPUs from jobs for which none was asked
    if not visible:
        visible = os.environ.get(VISIBLE_TO_THE_SWEEP, "")
    if visible == ALL_GPUS:
        return [str(number) for number in range(count_gpus())]
    # Whoever sets it to nothing, or to -1, wants none to be used
    return [name for name in visible.replace(" ", "").split(",") if name not in ("", "-1")]


def remember_visible_gpus() -> None:
    """Leave a note for the jobs of a sweep of which GPUs the process that drives it may use."""
    os.environ[VISIBLE_TO_THE_SWEEP] = os.environ.get("CUDA_VISIBLE_DEVICES", ALL_GPUS)


def count_gpus() -> int:
    """Count the GPUs of this machine.

    In another process, so that this one neither imports torch nor takes memory of a GPU.
    """
    environment = {**os.environ}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, "-c", COUNT_GPUS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    # Drivers may print too. Without a count the job says itself what is wrong
    last = done.stdout.split()[-1:]
    return int(last[0]) if last and last[0].isdigit() else 0


def train_job(folder: Path, overrides: list[str], gpus: Sequence[str] = ()) -> None:
    """Run one job as a child process, and note how it ended in job.json.

    gpus: the only ones that it may use; (): it sees what this process sees. Raises Stopped where a
    signal came meanwhile.
    """
    # Before it starts, so that the table accounts for a job that leaves nothing else
    write_json(folder / "job.json", {"overrides": overrides, "status": "running"})

    # resume=auto starts a new run where there is none, so one command does for both
    resume = [] if any(item.startswith("resume=") for item in overrides) else ["resume=auto"]
    settings = job_settings(overrides)
    command = [sys.executable, str(TRAIN), *settings, *resume, f"hydra.run.dir={folder}"]
    child = subprocess.Popen(
        command,
        env={**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})},
        # Ctrl-C goes to the whole group of the terminal: the child would get it twice, once from
        # there and once from here, and a second one ends it without saving
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


def wait_passing_signals_on(child: subprocess.Popen) -> tuple[int, signal.Signals | None]:
    """Wait for a child to end, and pass signals on to it meanwhile.

    Returns (its exit code, the first signal that was passed on, or None).
    """
    received: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        child.send_signal(number)

    # Those that make a run save and stop
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        exit_code = child.wait()
    finally:
        # Between two jobs a signal must end the driver as usual
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return exit_code, signal.Signals(received[0]) if received else None


def collect(sweep_folder: Path) -> list[Row]:
    """Return one row a job, with the keys of COLUMNS.

    They are sorted by ranked_by(), the best first, with jobs that have no such number at the end.
    """
    rows = [job_row(note) for note in sweep_folder.glob("*/job.json")]
    ranking = ranked_by(rows)

    def place(row: Row) -> tuple[bool, float, str]:
        value = row[f"val_{ranking}"]
        return value is None, 0 if value is None else -score(ranking, value), row["job"].zfill(8)

    return sorted(rows, key=place)


def ranked_by(rows: list[Row]) -> str:
    """Return what all jobs with a result were selected by, or top1 where they differ in that."""
    names = {row["select"] for row in rows if row["select"] is not None}
    return names.pop() if len(names) == 1 else "top1"


def job_row(note: Path) -> Row:
    """Return the row of the job that a job.json belongs to."""
    job, result = read_json(note), read_json(note.with_name("result.json"))
    status, reason = result.get("status"), result.get("reason", "")
    # A job that was killed, or has not come to its end yet, leaves no result.json
    if status is None:
        code = job.get("exit_code")
        status = "running" if code is None else "crashed"
        reason = "" if code is None else describe_exit(code)
    return {
        "job": note.parent.name,
        "overrides": " ".join(job_settings(job["overrides"])),
        # Earlier versions selected by top-1, and did not say so
        "select": result.get("select", "top1" if result else None),
        **{name: result.get(name) for name in MEASURED},
        "status": status,
        "reason": "" if status == "finished" else reason,
        "seconds": result.get("seconds"),
    }


def describe_exit(code: int) -> str:
    """Say why a child that left no result.json ended, from its exit code."""
    if code >= 0:
        return f"exit code {code}"
    # Python gives the number of the signal that killed a child as a negative code
    name = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        return f"signal {name}, which the system sends where memory runs out"
    return f"signal {name}"


def over_seeds(rows: list[Row]) -> list[Row]:
    """Return one row for all finished jobs that differ in their seed alone, the best group first.

    Keys: overrides, seeds (how many), and val_top1, test_top1 and the other metrics as (mean,
    sample standard deviation), or None where a job has none.
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
            **{name: mean_and_deviation([job[name] for job in jobs]) for name in MEASURED},
        }
        for overrides, jobs in groups.items()
        if len(jobs) > 1
    ]


def mean_and_deviation(values: list[float | None]) -> tuple[float, float] | None:
    # A mean over some of the seeds would not be comparable
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return statistics.mean(known), statistics.stdev(known)


def table(rows: list[Row]) -> str:
    """Return the ranked jobs as a table, and below them means and deviations over seeds."""
    ranking = ranked_by(rows)
    shown = shown_metrics(ranking)
    cells = [["rank", "job", *(title(name) for name in shown), "status", "overrides"]]
    for rank, row in enumerate(rows, start=1):
        cells.append(
            [
                "" if row[shown[0]] is None else str(rank),
                row["job"],
                *("" if row[name] is None else value_of(name, row[name]) for name in shown),
                row["status"],
                row["overrides"],
            ]
        )

    parts = [markdown_table(cells), *describe_ranking(rows, ranking)]
    if rows and rows[0][shown[0]] is not None:
        parts.append(f"best: python train.py {shlex.join(rows[0]['overrides'].split())}")
    # Below the table, which a long reason would make too wide for a screen
    reasons = [
        f"job {row['job']} {row['status']}: {one_line(row)}" for row in rows if row["reason"]
    ]
    if reasons:
        parts.append("\n".join(reasons))
    groups = over_seeds(rows)
    if groups:
        parts += ["mean ± standard deviation over seeds", table_over_seeds(groups, shown)]
    return "\n\n".join(parts)


def shown_metrics(ranking: str) -> list[str]:
    """Return the columns of the table: what is ranked by, and top-1."""
    names = ["top1"] if ranking == "top1" else [ranking, "top1"]
    return [f"{split}_{name}" for name in names for split in ("val", "test")]


def title(metric: str) -> str:
    """Return the head of a column: "val top-1" for val_top1."""
    split, _, name = metric.partition("_")
    return f"{split} {CRITERIA[name]}"


def value_of(metric: str, value: float) -> str:
    return describe_value(metric.partition("_")[2], value)


def describe_ranking(rows: list[Row], ranking: str) -> list[str]:
    """Return the line on what the jobs are ranked by; none where that is what they always are."""
    if ranking == "loss":
        return ["ranked by validation loss, the lowest first (train.select=loss)"]
    if ranking != "top1":
        return [f"ranked by validation {CRITERIA[ranking]} (train.select={ranking})"]
    if len({row["select"] for row in rows if row["select"] is not None}) > 1:
        return ["ranked by validation top-1, since the jobs differ in train.select"]
    return []


def one_line(row: Row) -> str:
    """Return the first line of the reason a job failed."""
    return shorten(row["reason"].splitlines()[0], MAX_REASON)


def table_over_seeds(groups: list[Row], shown: list[str]) -> str:
    cells = [["seeds", *(title(name) for name in shown), "overrides"]]
    for group in groups:
        values = []
        for name in shown:
            if group[name] is None:
                values.append("")
                continue
            mean, deviation = group[name]
            if name.endswith("_loss"):
                values.append(f"{mean:.4f} ± {deviation:.4f}")
            else:
                values.append(f"{100 * mean:.2f} ± {100 * deviation:.2f} %")
        cells.append([str(group["seeds"]), *values, group["overrides"] or "(none)"])
    return markdown_table(cells)


def draw(rows: list[Row], path: Path) -> None:
    """Draw the jobs that have a validation top-1 in the order of the table, the best at the top.

    The validation top-1 is a bar, the test top-1 a mark.
    """
    # Late: importing it takes a second, for which the driver's jobs need not wait
    from matplotlib.figure import Figure

    ranked = [row for row in rows if row["val_top1"] is not None][:BARS_DRAWN]
    if not ranked:
        return

    figure = Figure(figsize=(9, 1.2 + 0.3 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    heights = list(range(len(ranked), 0, -1))
    val = [100 * row["val_top1"] for row in ranked]
    axes.barh(heights, val, color="#8fb3d9", label="validation")

    # Stopped and failed jobs have no test accuracy
    tested = [
        (100 * row["test_top1"], height)
        for row, height in zip(ranked, heights, strict=True)
        if row["test_top1"] is not None
    ]
    if tested:
        x, y = zip(*tested, strict=True)
        axes.plot(x, y, "D", color="#1b3a5c", markersize=5, label="test")

    # The end of the overrides, where those that differ usually are
    labels = [f"{row['job']}: {row['overrides'][-70:]}" for row in ranked]
    axes.set_yticks(heights, labels, fontsize=8)

    # Not from 0, or jobs that differ by a point would look the same
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
