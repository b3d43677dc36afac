"""What the tests share: running the command line as a user does, and small images on disk."""

import errno
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from forkserver import ForkedProcess, ForkServer
from PIL import Image

ROOT = Path(__file__).parent.parent
Program = subprocess.Popen | ForkedProcess
# A model of small images with attention that differs from head to head
SMALL_BLOCKS = {
    "patch_size": 8,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "init": "trunc_normal",
    "init_range": 0.3,
}
# Waits after the step that the variable names, until a signal comes
WAITING, WAIT_AFTER_STEP = "tests/waiting_train.py", "WAIT_AFTER_STEP"
# A run of seconds, not minutes
TINY = [
    "experiment=digits",
    "augment=none",
    "model.num_layers=2",
    "model.hidden_size=64",
    "train.batch_size=128",
]
# The run of the fixture digits_run
DIGITS = [*TINY, "train.epochs=8", "optimizer.lr=0.003"]


def start(
    program: str,
    *arguments: str,
    cwd: Path,
    env: dict[str, str] | None = None,
    from_scratch: bool = False,
    start_new_session: bool = False,
    stdin: int | IO = subprocess.DEVNULL,
    stdout: int | IO = subprocess.PIPE,
    stderr: int | IO = subprocess.PIPE,
) -> Program:
    """Start a script of the repository, or a module of it, in the folder cwd.

    It is forked from a warm parent where that makes no difference; from_scratch: in no case.
    env: changes to this process's environment.
    """
    environment = {**os.environ, **(env or {})}
    path = ROOT / program if program.endswith(".py") else program
    streams = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
    if not from_scratch and sys.platform == "linux":
        server = fork_server()
        if server.can_start(environment):
            return server.start(
                path,
                *arguments,
                cwd=cwd,
                environment=environment,
                new_session=start_new_session,
                **streams,
            )
    command = [str(path)] if program.endswith(".py") else ["-m", program]
    return subprocess.Popen(
        [sys.executable, *command, *arguments],
        cwd=cwd,
        env=environment,
        start_new_session=start_new_session,
        text=True,
        **streams,
    )


@functools.cache
def fork_server() -> ForkServer:
    """The warm parent of all programs that this process starts; it ends with this process."""
    return ForkServer()


def run(
    program: str, *arguments: str, cwd: Path, timeout: float = 240, **options
) -> subprocess.CompletedProcess:
    """The finished process of `python program arguments…`; options are those of start()."""
    with start(program, *arguments, cwd=cwd, **options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def train(cwd: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    return run("train.py", *arguments, cwd=cwd, **options)


def train_to_step(step: int, *arguments: str, cwd: Path, run: str, **options) -> Program:
    """Start train.py; returns when it has come to a step, after which it waits for a signal.

    However late the signal comes, it comes in the middle. run: the run's folder in cwd, as the
    arguments name it; it logs every step.
    """
    process = start(WAITING, *arguments, cwd=cwd, env={WAIT_AFTER_STEP: str(step)}, **options)
    wait_until(lambda: has_come_to(cwd / run, step), process)
    return process


def has_come_to(run_folder: Path, step: int) -> bool:
    """Whether a run that logs every step has logged this one."""
    metrics = run_folder / "metrics.jsonl"
    return metrics.exists() and f'"step": {step}, "split": "train"' in metrics.read_text()


def losses_by_workers(cwd: Path, *arguments: str) -> list[list[float]]:
    """The losses of each step of training, without and with two processes that load the images.

    The runs lie in cwd/run0 and cwd/run2.
    """
    losses = []
    for workers in (0, 2):
        folder = f"run{workers}"
        own = ("train.log_every=1", f"runtime.workers={workers}", f"hydra.run.dir={folder}")
        done = train(cwd, *arguments, *own)
        assert done.returncode == 0, done.stderr
        metrics = rows(cwd / folder / "metrics.jsonl")
        losses.append([row["loss"] for row in metrics if row["split"] == "train"])
    return losses


def error_line(done: subprocess.CompletedProcess, code: int = 2) -> str:
    """The one line on standard error in which a mistake ends; fails for any other ending."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    return lines[0]


def read_result(run_folder: Path) -> dict:
    return json.loads((run_folder / "result.json").read_text())


def wait_until(condition: Callable[[], bool], process: Program) -> None:
    """Wait for something that a program is to bring about; fails where the program ends first."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "two minutes have passed"
        time.sleep(0.01)


def rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def close_folder(folder: Path, monkeypatch) -> None:
    """Let a folder be closed as to another user; root may open what has no permissions."""
    error = PermissionError(errno.EACCES, "Permission denied", str(folder))
    scandir, stat = os.scandir, os.stat

    def closed_scandir(path="."):
        if os.fspath(path) == str(folder):
            raise error
        return scandir(path)

    def closed_stat(path, *arguments, **options):
        if not isinstance(path, int) and Path(os.fsdecode(path)).parent == folder:
            raise error
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "scandir", closed_scandir)
    monkeypatch.setattr(os, "stat", closed_stat)


def make_images(
    root: Path,
    splits: dict[str, int],
    classes: tuple[str, ...] = ("cat", "dog"),
    size: tuple[int, int] = (40, 30),
) -> Path:
    """Write colored noise as JPEGs, root/<split>/<class>/<number>.jpg.

    The class sets the hue, so that it can be learned. splits: images of each class by split;
    size: (width, height) in pixels.
    """
    generator = np.random.default_rng(0)
    for split, count in splits.items():
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 120, (size[1], size[0], 3), dtype=np.uint8)
                pixels[..., label % 3] += 120
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return root
