"""TODO: say what this file is for."""

import contextlib
import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from vit.errors import ConfigError, DataError, Stopped, TrainingFailed, UserError
from vit.runs.sweep import begun

PATH_KEYS = (
    "data.root",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "resume",
    "pretrained",
    "checkpoint",
    "out",
)


def quote_paths(arguments: Sequence[str]) -> list[str]:
    """Quote the values of keys that hold paths, which may contain what Hydra's grammar refuses (ü ~ ( ) = ' , # [), and
    expand ~. A comma under -m stays a sweep."""
    sweep = "-m" in arguments or "--multirun" in arguments
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if (
            equals
            and key in PATH_KEYS
            and value not in ("", "null", "auto")
            and value[0] not in "'\""
            and not (sweep and "," in value)
        ):
            # In Hydra's quoted strings a backslash is itself, but before a quote or the end it must be doubled.
            value = re.sub(
                r"(\\*)('|$)",
                lambda match: match[1] * 2 + ("\\'" if match[2] else ""),
                os.path.expanduser(value),
            )
            value = f"'{value}'"
        quoted.append(key + equals + value)
    return quoted


def nearest(word: str, known: Sequence[str]) -> str:
    """ "; did you mean …?" with the known words nearest to a mistyped one, or all of them where none is near."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"


def known_keys(schema: type) -> list[str]:
    """Every key of the schema with dots, groups included."""
    keys: list[str] = []
    for name, parameter in schema.__dataclass_fields__.items():
        keys.append(name)
        if hasattr(parameter.type, "__dataclass_fields__"):
            keys += [f"{name}.{key}" for key in known_keys(parameter.type)]
    return keys


def composition_error(error: Exception, schema: type) -> str:
    """Hydra's or OmegaConf's complaint about the command line, as one line that says what to write instead."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        options = [option for option in error.options if not option.endswith("schema")]
        return f"{group}={name}: there is no conf/{group}/{name}.yaml{nearest(name, options)}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in f"{error}\n{cause}".split("\n") if line.strip()]
    wanted = re.search(r"Could not override '([^']+)'", str(error))
    full_key = getattr(cause, "full_key", None) or (wanted and wanted.group(1))
    if ("not in" in str(cause) and "Key" in str(cause)) or "No match in the defaults list" in str(
        error
    ):
        key = wanted.group(1) if wanted else str(full_key)
        return f"{key}: no such key{nearest(key, known_keys(schema))}"
    told = next(
        (line for line in lines if line.startswith(("Value ", "Invalid value ", "Object of "))),
        lines[0],
    )
    return f"{full_key}: {told}" if full_key and str(full_key) not in told else told


def prepare_arguments(arguments: Sequence[str]) -> list[str]:
    """What Hydra gets to parse: paths quoted, and the folder of resume=FOLDER as the run folder."""
    arguments = quote_paths(arguments)
    resume = next(
        (argument.partition("=")[2] for argument in arguments if argument.startswith("resume=")),
        "null",
    )
    if resume not in ("null", "auto") and not any(
        argument.startswith("hydra.run.dir=") for argument in arguments
    ):
        arguments.append(f"hydra.run.dir={resume}")
    return arguments


def happened_in(error: BaseException, function: str, script: str) -> bool:
    """Whether an exception passed through a function of the script itself."""
    return any(
        frame.name == function and Path(frame.filename).name == script
        for frame in traceback.extract_tb(error.__traceback__)
    )


class Sweeps(Callback):
    """Hydra's hook by which the process that drives a sweep, whichever launcher runs the jobs, knows the sweep's folder."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        begun.append(Path(config.hydra.sweep.dir))


class AlreadyTold(Exception):
    """Processes that this one has started ended with an exit code, and told why."""

    def __init__(self, exit_code: int):
        self.exit_code = exit_code


ended: list[
    UserError | TrainingFailed | Stopped | AlreadyTold
] = []  # how main() ended, where not well


@contextlib.contextmanager
def ending(speaks: bool = True) -> Iterator[None]:
    """Inside a Hydra main: keep the errors that end in one line from Hydra, which would add lines of its own to them.

    speaks: false in all but the first of several processes, which end in the same errors; what may be theirs alone, an
    unreadable picture, they tell.
    """
    try:
        yield
    except (UserError, TrainingFailed, Stopped) as error:
        ended.append(
            error if speaks or isinstance(error, DataError) else AlreadyTold(error.exit_code)
        )
    except AlreadyTold as error:
        ended.append(error)


def command_line(main: Callable[[], None], schema: type) -> int:
    """Run a Hydra main and return the exit code of the contract: 0 done, 2 the user's mistake, 3 gave up, 75 stopped by a
    signal. What is no user's mistake keeps its traceback (and Python's exit code 1)."""
    script = Path(sys.argv[0]).name
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises instead of printing and leaving
    # Launchers of sweeps unpickle main() in processes that were not started as this script, in whatever folder
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))
    )
    sys.argv[1:] = prepare_arguments(sys.argv[1:])
    try:
        main()
        if not ended:
            return 0
        if isinstance(ended[0], AlreadyTold):
            return ended[0].exit_code
        message, code = str(ended[0]), ended[0].exit_code
    except (UserError, Stopped) as error:  # of a sweep, which they end
        message, code = str(error), error.exit_code
    except ValueError as error:
        if not any(
            Path(frame.filename).name == "defaults_list.py"
            for frame in traceback.extract_tb(error.__traceback__)
        ):
            raise
        wrong = [
            argument
            for argument in sys.argv[1:]
            if not re.fullmatch(r"[^=.]+=[A-Za-z_]\w*|[^=]*\.[^=]*=.*", argument)
        ]
        message, code = (
            f"{' '.join(wrong)}: a group takes the name of one of its files, as in model=vit_s16",
            2,
        )
    except (HydraException, OmegaConfBaseException) as error:
        if happened_in(error, "main", script):
            raise
        message, code = composition_error(error, schema), ConfigError.exit_code
    except OSError as error:
        if happened_in(error, "main", script):
            raise
        message = f"{error.filename}: can't make this run folder ({error.strerror}); choose another with hydra.run.dir=FOLDER"
        code = ConfigError.exit_code
    print(f"{script}: {message}", file=sys.stderr)
    return code
