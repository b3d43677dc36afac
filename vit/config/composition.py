"""What Hydra and OmegaConf refuse in a command line or a YAML file, in one line that helps.

Their own messages have several lines and tracebacks, and name a key but not its file, or a Python
class but not the key.
"""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from vit.errors import ConfigError

# Groups of Hydra's own, of which conf/ has no files
PLUGINS = ("hydra/sweeper", "hydra/launcher")
# Groups whose files set keys of any group, and what makes them do so
GLOBAL_GROUPS = ("experiment", "search")
GLOBAL_PACKAGE = "# @package _global_"


def composition_error(error: Exception, schema: type) -> str:
    """Say in one line what to write instead.

    schema: the dataclass whose keys are suggested for a mistyped one.
    """
    # A choice of a group that has no file
    if isinstance(error, MissingConfigException) and error.options is not None:
        return missing_file(str(error.missing_cfg_file), error.options)

    # What check_override() did not see
    if isinstance(error, OverrideParseException):
        return f"{error.override}: expected KEY=VALUE or GROUP=NAME{path_key(error, schema)}"

    # Hydra's first line alone does not say what to write instead
    ambiguous = re.match(r"Ambiguous value for argument '(.*)'", str(error))
    if ambiguous:
        return (
            f"{ambiguous[1]}: several values are for a sweep, train.py -m; a list is written in "
            "brackets, as in data.mean=[0.5]"
        )

    # Of a value in a file and not on the command line, Hydra names the file
    in_file = re.match(r"In '([^']+)': ", str(error))
    mistake = mistaken_value(error, schema)
    return f"{in_file[1]}.yaml: {mistake}" if in_file else mistake


def path_key(error: OverrideParseException, schema: type) -> str:
    """Return ", as in …" where a path stands alone on the command line."""
    path = str(error.override)
    if not os.path.exists(path):
        return ""
    key = "checkpoint" if "checkpoint" in known_keys(schema) else "resume"
    return f", as in {key}={path}"


def missing_file(path: str, options: Sequence[str]) -> str:
    """Say which files a group has, and what a plugin of Hydra needs."""
    group, _, name = path.rpartition("/")
    known = [option for option in options if not option.endswith("schema")]
    if group in PLUGINS and known == ["basic"]:
        return f"{group}={name} needs pip install -r requirements-sweeps.txt"
    return f"{group}={name}: there is no conf/{group}/{name}.yaml{suggestion(name, known)}"


def mistaken_value(error: Exception, schema: type) -> str:
    """Say what is wrong with a key, or with its value."""
    # Hydra wraps OmegaConf's error, which alone has the key's full name as an attribute
    cause = error
    if isinstance(error.__cause__, OmegaConfBaseException):
        cause = error.__cause__
    written = re.search(r"full_key: (\S.*)", str(error))
    overridden = re.search(r"Could not override '([^']+)'", str(error))
    full_key = getattr(cause, "full_key", None) or first_group(written) or first_group(overridden)

    unknown_key = "Key" in str(cause) and "not in" in str(cause)
    if unknown_key or "No match in the defaults list" in str(error):
        key = first_group(overridden) or str(full_key)
        if key in GLOBAL_GROUPS:
            return f"its first line must be {GLOBAL_PACKAGE}, so that its keys are those of the run"
        return f"{key}: no such key{suggestion(key, known_keys(schema))}"

    # Of a message of several lines the one that says what is wrong with the value
    lines = [line.strip() for line in f"{error}\n{cause}".split("\n") if line.strip()]
    if any(line.endswith("is not Optional") for line in lines):
        return f"{full_key}: expected a value, got null"
    if any("is not a ListConfig" in line for line in lines):
        return f"{full_key}: expected a list, which is written in brackets, as in data.mean=[0.5]"

    # A single value, or a list, where the keys of a group are expected
    merged = re.search(r"Merge error: \w+ is not a subclass of (\w+)\. value: (.*)", str(error))
    if merged:
        group = group_classes(schema).get(merged[1], merged[1])
        return f"{group}: expected its keys, each as KEY: VALUE, got {merged[2]}"
    starts = ("Value ", "Invalid value ", "Object of ")
    line = next((line for line in lines if line.startswith(starts)), lines[0])
    return f"{full_key}: {line}" if full_key and str(full_key) not in line else line


def first_group(match: re.Match | None) -> str | None:
    return match[1] if match else None


def unreadable_file(error: MarkedYAMLError | UnicodeDecodeError) -> str:
    """Say in which file and line the syntax of YAML is broken."""
    if isinstance(error, UnicodeDecodeError):
        # Hydra does not say which file it was
        beginning = error.object[: error.start].decode()[-40:]
        byte = error.object[error.start]
        return f"a YAML file is not UTF-8 text: byte {byte:#x} after {beginning!r}"
    mark = error.problem_mark
    if mark is None:
        return " ".join(str(error).split())
    return f"{mark.name}, line {mark.line + 1}: {error.problem}"


def suggestion(word: str, known: Sequence[str]) -> str:
    """Return "; did you mean …?" with the known words nearest to a mistyped one, or else all."""
    # In letters, lr is far from optimizer.lr
    near = same_in_any_group(word, known)[:3] or difflib.get_close_matches(
        word, known, n=3, cutoff=0.5
    )
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; known: {', '.join(known)}"


def same_in_any_group(word: str, known: Sequence[str]) -> list[str]:
    """Return the known keys that have this name in whatever group."""
    return [key for key in known if key.rpartition(".")[2] == word.rpartition(".")[2]]


def refuse_dashes(arguments: Sequence[str], schema: type) -> None:
    """Raise ConfigError for a key that is written like an option of other programs."""
    for argument in arguments:
        word = argument.partition("=")[0].lstrip("-").replace("-", "_")
        meant = same_in_any_group(word, known_keys(schema))
        if argument.startswith("--") and meant:
            raise ConfigError(f"{argument}: keys are written without dashes, as {meant[0]}=VALUE")


def known_keys(schema: type) -> list[str]:
    """Return every key of a schema with dots, groups included."""
    keys: list[str] = []
    for item in fields(schema):
        keys.append(item.name)
        if isinstance(item.type, type) and is_dataclass(item.type):
            keys += [f"{item.name}.{key}" for key in known_keys(item.type)]
    return keys


def group_classes(schema: type) -> dict[str, str]:
    """Return {name of a dataclass: the group whose keys it holds}."""
    groups = [item for item in fields(schema) if is_dataclass(item.type)]
    return {getattr(item.type, "__name__", item.name): item.name for item in groups}
