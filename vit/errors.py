"""How a command ends when it doesn't end well. Each class carries its exit code; a bug has none of these and shows its
traceback (exit 1)."""

import contextlib
import sys
from collections.abc import Callable, Iterator


class UserError(ValueError):
    """A mistake in the configuration, the data or a checkpoint. The message is one line that names the key or the path,
    what was expected and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """The configuration asks for something impossible."""


class DataError(UserError):
    """A data set or a picture is missing or not what it should be."""


class CheckpointError(UserError):
    """A checkpoint or a run folder is missing, damaged or of another model."""


class TrainingFailed(Exception):
    """Training can't go on (a loss that is not finite, memory, disk); the last good checkpoint is kept."""

    exit_code = 3


class Stopped(Exception):
    """A signal asked for the end; the state is saved and the run can be resumed."""

    exit_code = 75


@contextlib.contextmanager
def writing_to(place: object, otherwise: str = "choose another place") -> Iterator[None]:
    """Inside: what the disk refuses becomes a ConfigError that names the place and says what to do otherwise. A closed pipe is
    no refusal."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ConfigError(
            f"{place}: can't write there ({error.strerror or error}); {otherwise}"
        ) from None


def run_command(name: str, command: Callable[[], None]) -> int:
    """Run a command of plain arguments (`python -m name`) and return its exit code."""
    try:
        command()
    except (UserError, TrainingFailed, Stopped) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    return 0
