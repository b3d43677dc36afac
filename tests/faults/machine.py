"""What the machine does to a run: a full disk, a lost worker, a second run, odd folder names."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from faults.trials import RUN, Effort, Row, children, finish
from helpers import Program, make_images, start, wait_until

from vit.checkpoints.run import read_last

LONG = [*RUN, "train.epochs=4000", "resume=auto"]
# Bytes of a file: the first checkpoint fits, the next one, with the optimizer's moments, does not
SMALL_DISK = 320_000
ODD_NAMES = [
    "bücher ü, it's (x)[1]{y} = 50% #1 ~ $HOME",
    "my images",
    "a=b,c",
    "it's",
]


def machine(work: Path, effort: Effort) -> Iterator[Row]:
    make_images(work / "images", {"train": 30, "test": 8})
    yield no_room(work)
    yield lost_worker(work, 1 if effort.quick else 5)
    yield one_folder(work)
    yield odd_names(work, ODD_NAMES[:1] if effort.quick else ODD_NAMES)


def no_room(work: Path) -> Row:
    row = Row("no room for a checkpoint: exit 3, the one before stays whole, resumable")
    command = [*RUN, "train.epochs=4", "resume=auto", "hydra.run.dir=full"]
    process = start("train.py", *command, cwd=work)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (SMALL_DISK, SMALL_DISK))
    _, errors = process.communicate(timeout=600)
    code = process.returncode
    named = "full" in errors and "disk" in errors and "Traceback" not in errors
    row.count(code == 3 and named, f"exit code {code}: {errors[-400:]}")

    checkpoints = work / "full" / "checkpoints"
    _, header, warning = read_last(checkpoints)
    kept = header["progress"]["step"] == 0 and warning is None
    row.count(kept, f"kept: {header['progress']}, {warning}")
    row.count(not list(checkpoints.glob(".*")), "a temporary file was left")

    code, errors = finish(work, *command)
    row.count(code == 0, f"resumed: exit code {code}: {errors[-400:]}")
    return row


def lost_worker(work: Path, attempts: int) -> Row:
    row = Row("a loader worker killed: reported within 60 s, exit 3, resumable")
    for attempt in range(attempts):
        process = start_with_workers(work, f"worker_{attempt}")
        # Workers of training live long; those of an evaluation come and go
        metrics = work / f"worker_{attempt}" / "metrics.jsonl"
        wait_until(lambda path=metrics: path.exists() and "train" in path.read_text(), process)
        began = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(children(process.pid)[0], signal.SIGKILL)
        _, errors = wait_at_most(process, 60)
        seconds = time.monotonic() - began
        named = "image" in errors and "Traceback" not in errors
        good = process.returncode == 3 and named and seconds < 60
        row.count(good, f"exit code {process.returncode} after {seconds:.0f} s: {errors[-400:]}")

    process = start("train.py", "resume=worker_0", cwd=work)
    metrics = work / "worker_0" / "metrics.jsonl"
    size = metrics.stat().st_size
    wait_until(lambda: metrics.stat().st_size > size, process)
    process.terminate()
    _, errors = wait_at_most(process, 60)
    row.count(process.returncode == 75, f"resumed: exit code {process.returncode} {errors[-300:]}")
    return row


def start_with_workers(work: Path, folder: str) -> Program:
    return start(
        "train.py",
        *LONG,
        f"hydra.run.dir={folder}",
        "runtime.workers=2",
        "train.eval_every=10000",
        "train.attention_every=null",
        cwd=work,
    )


def wait_at_most(process: Program, seconds: float) -> tuple[str, str]:
    """What a program wrote; it is killed where it does not end."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()


def one_folder(work: Path) -> Row:
    row = Row("two runs, one folder: the second exits 2 and names the first")
    command = [*LONG, "hydra.run.dir=shared"]
    process = start("train.py", *command, cwd=work)
    wait_until((work / "shared" / "metrics.jsonl").exists, process)
    code, errors = finish(work, *command)
    row.count(code == 2 and f"process {process.pid}" in errors, errors[-300:])
    process.send_signal(signal.SIGINT)
    process.communicate()
    row.count(process.returncode == 75, f"SIGINT: exit code {process.returncode}")

    # A killed process leaves its workers behind, which must not hold its lock
    process = start("train.py", "resume=shared", cwd=work)
    wait_until(lambda: bool(children(process.pid)), process)
    process.kill()
    process.wait()
    code, errors = finish(work, "resume=shared", "train.steps=1")
    refused = code == 2 and "train.steps" in errors and "in use" not in errors
    row.count(refused, f"after a kill: exit code {code} {errors[-300:]}")
    return row


def odd_names(work: Path, names: list[str]) -> Row:
    row = Row("folders with spaces, unicode and Hydra's special characters")
    for name in names:
        shutil.copytree(work / "images", work / name / "images")
        folders = [f"data.root={name}/images", f"hydra.run.dir={name}/run"]
        code, errors = finish(work, *RUN, *folders, "train.steps=2", "train.batch_size=8")
        finished = code == 0 and (work / name / "run" / "result.json").exists()
        row.count(finished, f"{name}: exit code {code} {errors[-300:]}")
    return row
