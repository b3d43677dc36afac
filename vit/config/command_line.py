"""Hydra's command line, with one-line errors and the exit codes of vit.errors.

Hydra prints tracebacks and several lines of advice for a mistyped key, and exits with 1 for all
that goes wrong; scripts and schedulers need to tell a mistake, a bug and a stopped run apart.
"""

import atexit
import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from vit.config.composition import composition_error, refuse_dashes, unreadable_file
from vit.config.config import CONF
from vit.errors import ConfigError, DataError, Stopped, TrainingFailed, UserError
from vit.files import open_missing_streams

# Keys that hold paths, which may contain characters of Hydra's grammar
PATH_KEYS = (
    "data.root",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "resume",
    "pretrained",
    "train.teacher",
    "checkpoint",
    "out",
)
NO_RESULTS = "No trials are completed yet."
# What Hydra raises for mistakes on the command line and in YAML files, and a bug may raise too
BUGS_LIKE_MISTAKES = (
    HydraException,
    OmegaConfBaseException,
    MarkedYAMLError,
    UnicodeDecodeError,
    OSError,
)


def run_main(main: Callable[[], None], schema: type) -> int:
    """Run a Hydra main and return its exit code.

    0: done; 2: a mistake of the user; 3: a search without a result; 75: a sweep was stopped by a
    signal. The errors of the task itself leave through task_errors() as SystemExit. A bug keeps its
    traceback, and Python's exit code 1.

    schema: the dataclass whose keys are suggested for a mistyped one.
    """
    open_missing_streams()
    # Hydra's log shows what every library has to say; of its fonts, in the middle of a first run
    logging.getLogger("matplotlib").setLevel(logging.WARNING)

    # So that Hydra raises instead of printing and exiting
    os.environ["HYDRA_FULL_ERROR"] = "1"

    # Launchers of sweeps (joblib, submitit) unpickle main() in processes that were not started as
    # this script and may run in another folder
    project = str(CONF.parent)
    paths = [project, os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)

    try:
        refuse_dashes(sys.argv[1:], schema)
        sys.argv[1:] = prepare_arguments(sys.argv[1:])
        main()
        return 0
    except (UserError, Stopped) as error:
        # Before the task, or of a sweep
        message, code = str(error), error.exit_code
    except (HydraException, OmegaConfBaseException) as error:
        message, code = composition_error(error, schema), ConfigError.exit_code
    except (MarkedYAMLError, UnicodeDecodeError) as error:
        message, code = unreadable_file(error), ConfigError.exit_code
    except OSError as error:
        # Hydra makes the run folder before it calls main; errors of the task do not get here
        reason = error.strerror or error
        key = "hydra.sweep.dir" if is_sweep(sys.argv) else "hydra.run.dir"
        message = (
            f"{error.filename}: can't make this run folder ({reason}); "
            f"choose another with {key}=FOLDER"
        )
        code = ConfigError.exit_code
    except ValueError as error:
        # Of Optuna, which looks for the best of no results
        if str(error) != NO_RESULTS:
            raise
        message, code = "no job of the search has a result", TrainingFailed.exit_code
    print_error(message)
    return code


@contextlib.contextmanager
def task_errors(wait_for_first: Callable[[], bool] | None = None) -> Iterator[None]:
    """End the process with one line for every error of the block that is not a bug.

    It goes around the body of a Hydra main. wait_for_first: in all but the first of several
    processes of a run, which end in the same errors. It gives the first time to report one and
    returns whether the first has done so.
    """
    try:
        yield
    except (UserError, TrainingFailed, Stopped) as error:
        if is_reported_here(error, wait_for_first):
            print_error(str(error))
        # SystemExit passes through Hydra, which would add lines of its own to another exception
        raise SystemExit(error.exit_code) from None
    except BUGS_LIKE_MISTAKES as error:
        # run_main would take them for the user's mistakes
        raise RuntimeError(f"unexpected {type(error).__name__}: {error}") from error


def is_reported_here(error: Exception, wait_for_first: Callable[[], bool] | None) -> bool:
    """Whether this process prints the error; see task_errors()."""
    # Only this process may have read the image file that can't be read
    if wait_for_first is None or isinstance(error, DataError):
        return True
    # A signal came to every process
    if isinstance(error, Stopped):
        return False
    # Every process finds a mistake of the user, but memory may be short in this one alone
    return not wait_for_first() and isinstance(error, TrainingFailed)


def print_error(message: str) -> None:
    """Print one line on standard error that begins with the script's name."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)


class AtSweepEnd(Callback):
    """Calls a function with the sweep's folder when the process that drives the sweep exits.

    A callback of Hydra, named in conf/train.yaml. Hydra's on_multirun_end would be the place for
    it, but is not called after a job that failed.
    """

    def __init__(self, call: Callable[[Path], None]):
        self.call = call

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        atexit.register(self.call, Path(config.hydra.sweep.dir))


def prepare_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments for Hydra: paths quoted, and resume=FOLDER also as the run folder.

    Raises ConfigError for an override that Hydra could not parse or would answer with a traceback,
    and where a resumed run is given a file, or another folder beside its own.
    """
    prepared = quote_paths(arguments)
    given = {key: value for key, _, value in (argument.partition("=") for argument in prepared)}
    resume = given.get("resume", "null")
    if resume not in ("null", "auto"):
        if os.path.isfile(resume.strip("'\"")):
            raise ConfigError(
                f"resume={resume} is a file; give the run's folder, which holds config.yaml and "
                "checkpoints/"
            )
        folder = given.get("hydra.run.dir")
        if folder is None:
            prepared.append(f"hydra.run.dir={resume}")
        elif not same_path(folder, resume):
            raise ConfigError(
                f"hydra.run.dir={folder} beside resume={resume}, which is the run's folder; leave "
                "it out, or give resume=auto"
            )

    # Options such as -m and --help are no overrides, and an argument without "=" may be the value
    # of one, as in --cfg job
    overrides = [item for item in prepared if "=" in item and not item.startswith("-")]
    for override in overrides:
        check_override(override)
    # In a row, since Hydra takes no override behind an option that comes between others
    return [item for item in prepared if item not in overrides] + overrides


def configuration_options(job: HydraConf) -> list[str]:
    """Return the options by which another process finds the YAML files that this one was given.

    Raises ConfigError where a file of the user's folder is hidden by one of conf/.
    """
    sources = {source.provider: source.path for source in job.runtime.config_sources}
    options = []
    if Path(sources["main"]) != CONF:
        options.append(f"--config-path={sources['main']}")
    if "command-line" in sources:
        own = Path(sources["command-line"])
        refuse_hidden_files(own)
        options.append(f"--config-dir={own}")
    if job.job.config_name != "train":
        options.append(f"--config-name={job.job.config_name}")
    return options + [item for item in job.overrides.hydra if item.startswith("hydra.searchpath=")]


def refuse_hidden_files(own: Path) -> None:
    """Raise ConfigError where a folder has a file of a group and name that conf/ has too.

    Hydra reads that of conf/ without a word.
    """
    for file in sorted(own.rglob("*.yaml")):
        if own != CONF and (CONF / file.relative_to(own)).exists():
            raise ConfigError(
                f"--config-dir: {file} has the name of a file of the project, conf/"
                f"{file.relative_to(own)}, which would be read instead; rename yours"
            )


def is_sweep(arguments: Sequence[str]) -> bool:
    return "-m" in arguments or "--multirun" in arguments


def same_path(first: str, second: str) -> bool:
    """Whether two values, which may be in quotes, are the same path."""
    return os.path.abspath(first.strip("'\"")) == os.path.abspath(second.strip("'\""))


def quote_paths(arguments: Sequence[str]) -> list[str]:
    """Quote the values of keys that hold paths, and expand ~ in them.

    Paths may contain what Hydra's grammar refuses outside quotes: ü ~ ( ) = ' , # [
    """
    sweep = is_sweep(arguments)
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        # Words of the grammar, and what the user has quoted
        special = value in ("", "null", "auto") or value[:1] in ("'", '"')
        # Under -m a comma separates the values of a sweep
        swept = sweep and "," in value
        if equals and key in PATH_KEYS and not special and not swept:
            value = quote(os.path.expanduser(value))
        quoted.append(key + equals + value)
    return quoted


def quote(value: str) -> str:
    """Return a string in Hydra's single quotes.

    A backslash stands for itself there, but must be doubled before a quote or the end.
    """

    def escape(match: re.Match) -> str:
        backslashes = match[1] * 2
        return backslashes + ("\\'" if match[2] else "")

    return "'" + re.sub(r"(\\*)('|$)", escape, value) + "'"


def check_override(argument: str) -> None:
    """Raise ConfigError where Hydra can't parse an override, or a group is not given a name."""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        raise ConfigError(
            f"{argument}: expected KEY=VALUE or GROUP=NAME; a value with special characters "
            "must be quoted, as in 'KEY=\"it, too\"'"
        ) from None
    if override.key_or_group not in group_names() or override.is_delete():
        return

    # Hydra answers a number, a list or a dictionary here (model=3) with a traceback of its own
    value = override.value()
    if not (value is None or isinstance(value, str | ChoiceSweep)):
        raise ConfigError(f"{argument}: expected the name of a file, as in model=vit_s16")


def group_names() -> set[str]:
    """Return the names of the groups of conf/."""
    return {path.name for path in CONF.iterdir() if path.is_dir()}
