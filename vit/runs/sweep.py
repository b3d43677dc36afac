"""The jobs of a sweep, `train.py -m`: each has a process and a folder of its own.

Hydra's basic launcher would run all jobs in one process, where a crash ends the whole sweep and
memory is not given back.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vit.errors import ConfigError, Stopped, TrainingFailed
from vit.files import lock, read_json, write_json
from vit.runs.folder import wait_until_free
from vit.runs.selection import score_of
from vit.runtime.launch import end_with_parent

TRAIN = Path(__file__).parents[2] / "train.py"
# How long a job, whose driver was killed, may take to save and release its folder
SECONDS_TO_LET_GO = 120
# Of the whole sweep: they mean nothing to one of its jobs
SETTINGS_OF_SWEEPS = ("search=", "+search=", "jobs_at_once=")
# Where the process that drives a sweep leaves what CUDA_VISIBLE_DEVICES was, for its jobs
VISIBLE_TO_THE_SWEEP = "VIT_VISIBLE_DEVICES"
ALL_GPUS = "all"
COUNT_GPUS = "import torch; print(torch.cuda.device_count())"


def run_job(
    folder: Path,
    overrides: list[str],
    jobs_at_once: int | None = None,
    searching: bool = False,
) -> float | None:
    """Train one job in a child process, and return what is maximized, or None where it has none.

    That is the number of the validation split that train.select names, of the loss its negative.
    searching: a search chooses the next values by it.

    Where the folder holds the same job from an earlier start of the sweep, the job is left alone if
    it is finished, resumed if it has a checkpoint, and else started over. jobs_at_once: of this
    sweep on this machine, each with its part of the GPUs.

    A job that fails raises nothing, so that the other jobs are run. Raises Stopped on a signal,
    which was passed on to the child so that it could save, and ConfigError where the folder holds
    another job, or a search gets no number of a job that has finished.
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

    result = read_json(folder / "result.json")
    if not result and read_json(folder / "job.json").get("exit_code") == 0:
        # explain=true, which is no run: not a row of the table, nor in the way of a sweep
        (folder / "job.json").unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()

    # None tells a sweeper that the job failed; at NaN Optuna's would end the search in a traceback
    value = score_of(result)
    if searching and value is None and result.get("status") == "finished":
        raise ConfigError(
            "a search maximizes a number of the validation split, and nothing is held out; "
            "give data.val_fraction=0.1"
        )
    return value


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
    write_note(folder, {"overrides": overrides, "status": "running"})

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
    write_note(folder, ended)

    if received is not None:
        raise Stopped(
            f"the sweep was stopped by {received.name} in job {folder.name}; resume it by the same "
            f"command and hydra.sweep.dir={folder.parent}"
        )


def write_note(folder: Path, values: dict[str, Any]) -> None:
    """Write a job's job.json. Raises TrainingFailed where the disk refuses it."""
    try:
        write_json(folder / "job.json", values)
    except OSError as error:
        # A full disk would refuse the other jobs too
        raise TrainingFailed(
            f"{folder}: can't be written ({error.strerror or error}), which ends the sweep; go on "
            f"with it by the same command and hydra.sweep.dir={folder.parent}"
        ) from None


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
