"""One run, one folder: its lock, its log, its configuration and its result.json."""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Stopped,
    TrainingFailed,
    UserError,
)
from vit.files import lock, read_json, write_json, write_text
from vit.text import shorten

log = logging.getLogger("vit")
# Hydra's root handler would print every line once more
log.propagate = False

# Characters in result.json; an exception may hold a whole compiler's output
MAX_REASON = 300
FILES_OF_A_RUN = {"config.yaml", "checkpoints", "metrics.jsonl"}


class RunFolder:
    """A run's folder, locked by one process at a time.

    overrides: of the command line, as given; writes: whether this process writes; of the processes
    of one run only the first does. Raises ConfigError where the folder can't be written, or another
    process has locked it, and names that process.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = (), writes: bool = True):
        # Relative, so that the commands which are printed stay short
        if path.is_relative_to(Path.cwd()):
            path = path.relative_to(Path.cwd())
        self.path, self.overrides, self.writes = path, list(overrides), writes
        # Whether this command may write result.json
        self.owns_result = False
        # False where the file system has no locks: a run that is alone there must not be refused
        self.has_lock = True
        # What an unfinished run has to say in result.json; begin() sets it
        self.describe_progress: Callable[[], dict[str, Any]] = dict
        if writes:
            self.lock()
            # A command that is refused must leave the result of the run that is here already
            self.owns_result = not self.holds_a_run()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def lock(self) -> None:
        """Lock the folder until this process ends, however it ends.

        The lock is the kernel's, on the file .lock, so there is no stale one to clean up. Where the
        file system has no locks, start_log() warns of it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Open until the process ends; appending, so that the holder's name is not cut off
            self.lock_file = open(self.path / ".lock", "a+")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f"{self.path}: can't write the run folder ({error.strerror}); "
                "choose another with hydra.run.dir=FOLDER"
            ) from None

        try:
            self.has_lock = lock(self.lock_file)
        except BlockingIOError:
            self.lock_file.seek(0)
            holder = self.lock_file.read().strip() or "just starting"
            raise ConfigError(
                f"{self.path}: in use by another run ({holder}); wait for it "
                "or choose another folder with hydra.run.dir=FOLDER"
            ) from None

        # The loader's processes inherit the open file, and would keep the lock after a kill
        os.register_at_fork(after_in_child=self.lock_file.close)
        self.lock_file.truncate(0)
        self.lock_file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.lock_file.flush()

    def follow(self, path: str) -> None:
        """Use the folder of the process that writes, and remove the one Hydra made for this one.

        The default folder's name holds a time, which differs between the processes of torchrun.
        """
        if not self.writes and self.path != Path(path):
            self.remove()
            self.path = Path(path)

    def contents(self) -> set[str]:
        """Return the names of what is in the folder, without the lock."""
        if not self.path.is_dir():
            return set()
        return {entry.name for entry in self.path.iterdir()} - {".lock"}

    def has_checkpoint(self) -> bool:
        return self.checkpoints.is_dir() and any(self.checkpoints.glob("*.safetensors"))

    def holds_a_run(self) -> bool:
        """Whether a run has left its files here."""
        # Others do not count: a sweep has written job.json before it starts this very run
        return bool(FILES_OF_A_RUN & self.contents())

    def finished_at(self, step: int) -> bool:
        """Whether result.json says that the run is finished after so many steps."""
        result = read_json(self.path / "result.json")
        return result.get("status") == "finished" and result.get("steps") == step

    def require_empty(self) -> None:
        """Raise ConfigError where another run has left its files here."""
        if self.holds_a_run():
            raise ConfigError(
                f"{self.path}: holds a run already; resume it by resume={self.path}, or choose "
                "another folder with hydra.run.dir=FOLDER"
            )

    def require_checkpoint(self) -> None:
        """Raise CheckpointError where there is nothing to resume.

        What is no run's folder, such as one that holds many runs, is left as it was.
        """
        if not self.has_checkpoint():
            if self.writes and not self.holds_a_run():
                self.owns_result = False
                (self.path / ".lock").unlink(missing_ok=True)
            raise CheckpointError(
                f"resume={self.path}: no checkpoint in {self.checkpoints}; "
                "give the folder of a run (it holds config.yaml and checkpoints/)"
            )

    def kept_checkpoint(self) -> str:
        """Say how to resume, at the end of a failed run's message; nothing without a checkpoint."""
        if not self.has_checkpoint():
            return ""
        return f"; the last checkpoint is kept: resume it by resume={self.path}"

    def remove(self) -> None:
        """Leave no empty folder behind a command that ended before its run started."""
        (self.path / ".lock").unlink(missing_ok=True)
        remove_empty(self.path)

    def start_log(self, write: Callable[[str], None]) -> None:
        """Send the lines of the log to `write`, for the screen, and with their time to train.log.

        In processes that do not write, the log is silent.
        """
        # A full disk must not fill the screen with the log's own tracebacks
        logging.raiseExceptions = False
        if not self.writes:
            log.disabled = True
            return

        log.setLevel(logging.INFO)
        screen = logging.Handler()
        screen.emit = lambda record: write(screen.format(record))
        file = logging.FileHandler(self.path / "train.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.handlers = [screen, file]
        if not self.has_lock:
            log.info(
                f"warning: the file system of {self.path} has no locks, so that no second run into "
                "the folder is refused; start none"
            )

    def begin(self, yaml: str, describe_progress: Callable[[], dict[str, Any]]) -> None:
        """Write config.yaml; from now on the folder and its result.json are this run's.

        describe_progress: returns what an unfinished run has to say in result.json.
        """
        self.describe_progress = describe_progress
        self.owns_result = True
        if self.writes:
            self.checkpoints.mkdir(exist_ok=True)
            write_text(self.path / "config.yaml", yaml)

    @contextlib.contextmanager
    def outcome(self) -> Iterator["RunFolder"]:
        """Write to result.json how and why the run of the block ended, where it ends early.

        Where the run had not started, no folder is left. Every error passes through.
        """
        try:
            yield self
        except (UserError, TrainingFailed, Stopped) as error:
            if isinstance(error, Stopped) and self.has_checkpoint():
                error.args = (f"{error}; resume it by resume={self.path}",)
            # Images that are damaged show in the middle of a run
            if isinstance(error, DataError):
                error.args = (f"{error}{self.kept_checkpoint()}",)
            if self.writes:
                self.end_early(error)
            else:
                # Hydra may have made it anew after the first process had removed it
                remove_empty(self.path)
            raise
        except BaseException as error:
            # A bug, or Ctrl-C before there is a handler: noted, and passed on with its traceback
            self.write_outcome("failed", f"{type(error).__name__}: {error}")
            raise

    def end_early(self, error: Exception) -> None:
        """Say in the log and in result.json why the run ended, or remove an empty folder."""
        if not self.contents():
            self.remove()
            return

        status = "stopped" if isinstance(error, Stopped) else "failed"
        log.info(f"{status}: {error}")
        self.write_outcome(status, str(error))

    def write_outcome(self, status: str, reason: str) -> None:
        """Write result.json of a run that has not finished, where this command may."""
        if self.owns_result and self.writes:
            reason = shorten(reason, MAX_REASON)
            # A full disk must not hide the reason why the run ended
            with contextlib.suppress(OSError):
                self.write_result(status=status, reason=reason, **self.describe_progress())

    def write_result(self, **values: Any) -> None:
        """Write result.json.

        values: status (finished, stopped, failed), reason, and what the run measured.
        """
        if self.writes:
            write_json(self.path / "result.json", values)


def remove_empty(path: Path) -> None:
    """Remove a run's folder and the one it is in, unless they hold anything."""
    # rmdir refuses folders that are not empty, such as a parent that holds other runs
    with contextlib.suppress(OSError):
        path.rmdir()
        path.parent.rmdir()


@contextlib.contextmanager
def removed_if_refused(path: Path) -> Iterator[None]:
    """Leave no empty folder where the command is refused before there is a RunFolder."""
    try:
        yield
    except UserError:
        remove_empty(path)
        raise


def wait_until_free(path: Path, seconds: float) -> None:
    """Wait until another process releases a run's folder, at most so many seconds."""
    deadline = time.monotonic() + seconds
    while (path / ".lock").exists() and time.monotonic() < deadline:
        # A shared lock, which is given only while nobody has the exclusive one
        with open(path / ".lock") as file:
            try:
                lock(file, shared=True)
                return
            except BlockingIOError:
                time.sleep(0.2)
