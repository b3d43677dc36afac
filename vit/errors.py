"""The errors that end a command in one line, each with its exit code.

A bug is none of these: it keeps its traceback and ends in exit code 1.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator


class UserError(ValueError):
    """The user can correct this: a mistake in the configuration, the data or a checkpoint.

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
    """Training can't continue; the last checkpoint is kept.

    The loss is not finite, or the machine has no memory or disk space left.
    """

    exit_code = 3


class Stopped(Exception):
    """A signal, or a limit of time, asked the run to stop; it is saved and can be resumed."""

    # EX_TEMPFAIL of sysexits.h: schedulers take it as "start me again"
    exit_code = 75


@contextlib.contextmanager
def writing_to(place: object, advice: str = "choose another place") -> Iterator[None]:
    """Turn an OSError of the block into a ConfigError.

    place: a path or a name for the message; advice: how the message ends.
    """
    try:
        yield
    except BrokenPipeError:
        # The reader of our output has left (`| head`), which is no mistake of the user's
        raise
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{place}: can't write there ({reason}); {advice}") from None


def run_command(name: str, command: Callable[[], None]) -> int:
    """Run a command with plain arguments, such as `python -m vit.predict`.

    name: how the command's error messages begin. Returns the exit code; a bug passes through.
    """
    try:
        command()
    except (UserError, TrainingFailed, Stopped) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        # 128 + SIGINT, as a shell reports it; a traceback would tell nobody anything
        return 130
    return 0
