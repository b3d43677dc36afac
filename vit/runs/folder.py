"""One run, one folder: its lock, its log, its configuration and its result.json."""

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vit.errors import CheckpointError, ConfigError, Stopped, TrainingFailed, UserError
from vit.files import write_json, write_text

log = logging.getLogger("vit")


class RunFolder:
    """A run's folder, held by one process at a time. writes: whether this is that process; of the processes of one run only
    the first is, the others look on.

    The lock is the kernel's, on the file .lock, so it ends with the process that held it, however that ended. Raises
    ConfigError where the folder can't be written or another process holds it, naming that process.
    """

    def __init__(self, path: Path, writes: bool = True):
        path = (
            path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        )  # short where it can be
        self.path, self.writes = path, writes
        self.begun = False  # whether result.json is ours to write
        self.so_far: Callable[[], dict[str, Any]] = (
            dict  # what an unfinished run has to tell for result.json
        )
        self.checkpoints, self.tensorboard = path / "checkpoints", path / "tensorboard"
        if not writes:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = open(path / ".lock", "a+")  # noqa: SIM115  (held until the process ends)
        except OSError as error:
            raise ConfigError(
                f"{path}: can't write the run folder ({error.strerror}); choose another with "
                "hydra.run.dir=FOLDER"
            ) from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            raise ConfigError(
                f"{path}: in use by another run ({self.lock.read().strip() or 'just starting'}); wait for it "
                "or choose another folder with hydra.run.dir=FOLDER"
            ) from None
        os.register_at_fork(
            after_in_child=self.lock.close
        )  # or the loader's processes would hold it after a kill
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.lock.flush()
        self.begun = not self.holds_a_run()

    def follow(self, path: str) -> None:
        """Look on in the folder of the process that writes; one that Hydra has made for this process is removed."""
        if not self.writes and self.path != Path(path):
            self.remove()
            self.path, self.checkpoints = Path(path), Path(path) / "checkpoints"

    def contents(self) -> set[str]:
        return (
            set()
            if not self.path.is_dir()
            else {entry.name for entry in self.path.iterdir()} - {".lock"}
        )

    def has_checkpoint(self) -> bool:
        return self.checkpoints.is_dir() and any(self.checkpoints.glob("*.safetensors"))

    def holds_a_run(self) -> bool:
        """Whether a run has left its files here; job.json is a sweep's note of this very run."""
        return bool({"config.yaml", "checkpoints", "metrics.jsonl"} & self.contents())

    def require_empty(self) -> None:
        """Raise ConfigError where another run has left its files here."""
        if self.holds_a_run():
            raise ConfigError(
                f"{self.path}: holds a run already; go on with it by resume={self.path}, or choose another "
                "folder with hydra.run.dir=FOLDER"
            )

    def require_checkpoint(self) -> None:
        if not self.has_checkpoint():
            raise CheckpointError(
                f"resume={self.path}: no checkpoint in {self.checkpoints}; give the folder of a run "
                "(it holds config.yaml and checkpoints/)"
            )

    def remove(self) -> None:
        """Leave no empty folder behind a command that ended before its run began."""
        (self.path / ".lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the parent may hold other runs
            self.path.rmdir()
            self.path.parent.rmdir()

    def start_log(self, write: Callable[[str], None]) -> None:
        """Lines of the log go to the screen, through `write`, and with their time to train.log."""
        logging.raiseExceptions = (
            False  # a full disk must not fill the screen with the log's own tracebacks
        )
        log.propagate = False
        if not self.writes:
            log.disabled = True
            return
        log.setLevel(logging.INFO)
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
        except (UserError, TrainingFailed, Stopped) as error:
            if isinstance(error, Stopped) and self.has_checkpoint():
                error.args = (f"{error}; go on with it by resume={self.path}",)
            if not self.writes:
                raise
            if self.contents():
                status = "stopped" if isinstance(error, Stopped) else "failed"
                log.info(f"{status}: {error}")
                self.write_outcome(status, str(error))
            else:
                self.remove()
            raise
        except BaseException as error:
            self.write_outcome("failed", f"{type(error).__name__}: {error}")
            raise

    def write_outcome(self, status: str, reason: str) -> None:
        """result.json of a run that has not finished; the reason it ended goes before a disk that takes no more."""
        if (
            self.begun and self.writes
        ):  # a command that was refused leaves the result of the run that stands here
            with contextlib.suppress(OSError):
                self.write_result(status=status, reason=reason, **self.so_far())

    def write_config(self, yaml: str) -> None:
        if self.writes:
            write_text(self.path / "config.yaml", yaml)

    def write_result(self, **values: Any) -> None:
        """result.json: status (finished, stopped, failed), reason, and what the run measured."""
        if self.writes:
            write_json(self.path / "result.json", values)


def wait_until_free(path: Path, seconds: float) -> None:
    """Wait for as long for another process to let go of a run's folder."""
    deadline = time.monotonic() + seconds
    while (path / ".lock").exists() and time.monotonic() < deadline:
        with open(path / ".lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.2)
