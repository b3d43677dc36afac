"""One run, one folder: its lock, its log, its configuration and its result.json."""

import contextlib
import fcntl
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vit.errors import CheckpointError, ConfigError, GaveUp, Stopped, UserError

log = logging.getLogger("vit")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Atomically, for a person to read."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(temporary, path)


class RunFolder:
    """A run's folder, held by one process at a time.

    The lock is the kernel's, on the file .lock, so it ends with the process that held it, however that ended. Raises
    ConfigError where the folder can't be written or another process holds it, naming that process.
    """

    def __init__(self, path: Path):
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path  # short where it can be
        self.path = path
        self.checkpoints, self.tensorboard = path / "checkpoints", path / "tensorboard"
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = open(path / ".lock", "a+")  # noqa: SIM115  (held until the process ends)
        except OSError as error:
            raise ConfigError(f"{path}: can't write the run folder ({error.strerror}); choose another with "
                              "hydra.run.dir=FOLDER") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            raise ConfigError(f"{path}: in use by another run ({self.lock.read().strip() or 'just starting'}); wait for it "
                              "or choose another folder with hydra.run.dir=FOLDER") from None
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.lock.flush()

    def contents(self) -> set[str]:
        return {entry.name for entry in self.path.iterdir()} - {".lock"}

    def has_checkpoint(self) -> bool:
        return self.checkpoints.is_dir() and any(self.checkpoints.glob("*.safetensors"))

    def require_empty(self) -> None:
        """Raise ConfigError where another run has left its files here; job.json is a sweep's note of this very run."""
        if {"config.yaml", "checkpoints", "metrics.jsonl"} & self.contents():
            raise ConfigError(f"{self.path}: holds a run already; go on with it by resume={self.path}, or choose another "
                              "folder with hydra.run.dir=FOLDER")

    def require_checkpoint(self) -> None:
        if not self.has_checkpoint():
            raise CheckpointError(f"resume={self.path}: no checkpoint in {self.checkpoints}; give the folder of a run "
                                  "(it holds config.yaml and checkpoints/)")

    def remove(self) -> None:
        """Leave no empty folder behind a command that ended before its run began."""
        (self.path / ".lock").unlink()
        with contextlib.suppress(OSError):  # the parent may hold other runs
            self.path.rmdir()
            self.path.parent.rmdir()

    def start_log(self, write: Callable[[str], None]) -> None:
        """Lines of the log go to the screen, through `write`, and with their time to train.log."""
        log.setLevel(logging.INFO)
        log.propagate = False
        screen = logging.Handler()
        screen.emit = lambda record: write(screen.format(record))
        file = logging.FileHandler(self.path / "train.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.handlers = [screen, file]

    @contextlib.contextmanager
    def outcome(self) -> Iterator["RunFolder"]:
        """Around a run: where it ends early, result.json says how and why, or, where nothing was begun, no folder is left."""
        try:
            yield self
        except (UserError, GaveUp, Stopped) as error:
            if self.contents():
                status = "stopped" if isinstance(error, Stopped) else "failed"
                log.info(f"{status}: {error}")
                self.write_result(status=status, reason=str(error))
            else:
                self.remove()
            raise
        except BaseException as error:
            self.write_result(status="failed", reason=f"{type(error).__name__}: {error}")
            raise

    def write_config(self, yaml: str) -> None:
        (self.path / "config.yaml").write_text(yaml)

    def write_result(self, **values: Any) -> None:
        """result.json: status (finished, stopped, failed), reason, and what the run measured."""
        write_json(self.path / "result.json", values)


def cut_back(path: Path, step: int) -> None:
    """Drop the lines of a .jsonl file that come after a step, and a last line that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
