"""How a command ends when it does not end well.

Each class carries its exit code. A bug is none of these: it shows its traceback, with exit code 1.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator


class UserError(ValueError):
    """A mistake in the configuration, the data or a checkpoint.

    The message is one line that names the key or the path, what was expected and what to do.
    """

    exit_code = 2


class ConfigError(UserError):
    """The configuration asks for something impossible."""


class DataError(UserError):
    """A data set or an image file is missing or not what it should be."""


class CheckpointError(UserError):
    """A checkpoint or a run folder is missing, damaged or of another model."""


class TrainingFailed(Exception):
    """Training can't continue: a loss that is not finite, memory, disk. The last checkpoint is
    kept.
    """

    exit_code = 3


class Stopped(Exception):
    """A signal asked the run to stop; its state is saved and it can be resumed."""

    exit_code = 75


@contextlib.contextmanager
def writing_to(place: object, advice: str = "choose another place") -> Iterator[None]:
    """Inside: what the disk refuses becomes a ConfigError that names the place and gives advice.

    A closed pipe is not a refusal and passes through.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{place}: can't write there ({reason}); {advice}") from None


def run_command(name: str, command: Callable[[], None]) -> int:
    """Run a command of plain arguments (`python -m name`) and return its exit code."""
    try:
        command()
    except (UserError, TrainingFailed, Stopped) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    return 0
