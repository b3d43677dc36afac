"""What a key of the configuration may hold, declared beside the key.

A group's dataclass declares every key with `setting(...)`: the range of its value, the choices of
another key that it belongs to, and whether a resumed run may change it. Values are in conf/ alone,
so that there is one place to look for a default.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING

from vit.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """The values a key may hold: a test, and the same in words for the error message."""

    allows: Callable[[Any], bool]
    expected: str


def one_of(*names: str) -> Range:
    """Return the range of a key that holds one of a few words.

    It stands in for typing.Literal, which OmegaConf refuses.
    """
    return Range(lambda value: value in names, f"one of {', '.join(names)}")


def is_duration(value: Any) -> bool:
    """Whether a value is a number from 0, or a number of epochs as text: "5ep", "0.5ep"."""
    if isinstance(value, str):
        return re.fullmatch(r"\d+(\.\d+)?ep", value) is not None
    # A bool is an int to Python, but "warmup: true" is a mistake
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


POSITIVE = Range(lambda value: value > 0, "a positive number")
NOT_NEGATIVE = Range(lambda value: value >= 0, "0 or more")
PROBABILITY = Range(lambda value: 0 <= value <= 1, "from 0 to 1")
BELOW_ONE = Range(lambda value: 0 <= value < 1, "at least 0 and below 1")
FRACTION = Range(lambda value: 0 < value <= 1, "above 0 and at most 1")
DURATION = Range(is_duration, "a fraction of the run (0.05), steps (500) or epochs (5ep)")

# Whether a resumed run may change a key: not without resume_changed=allow; yes, with a warning that
# the last bits may differ; yes, since it can't change the result
REFUSED, BITS_MAY_DIFFER, FREE = "refused", "bits may differ", "free"


@dataclass(frozen=True)
class Belongs:
    """The key that decides whether a setting has an effect, and the values with which it has."""

    key: str
    values: tuple[str, ...]


def belongs_to(key: str, *values: str) -> Belongs:
    return Belongs(key, values)


def setting(
    allowed: Range | None = None, *, belongs: Belongs | None = None, on_resume: str = REFUSED
) -> Any:
    """Declare a key of a group's dataclass; its value comes from conf/.

    allowed: the range of its value; null means "not set" and is allowed where the type allows it.
    belongs: the setting does nothing with other values of that key, and is refused beside them
    unless it is null.
    on_resume: REFUSED, BITS_MAY_DIFFER or FREE.
    """
    # MISSING is OmegaConf's mark of a mandatory key: one that conf/ forgets is found at once
    metadata = {"allowed": allowed, "belongs": belongs, "on_resume": on_resume}
    return field(default=MISSING, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """A declared key with its full name, such as optimizer.lr."""

    key: str
    allowed: Range | None
    belongs: Belongs | None
    on_resume: str


def settings_of(schema: type, prefix: str = "") -> Iterator[Setting]:
    """Yield every key of a dataclass and of the groups in it, with full names."""
    for item in fields(schema):
        key = prefix + item.name
        if isinstance(item.type, type) and is_dataclass(item.type):
            yield from settings_of(item.type, f"{key}.")
        elif "allowed" in item.metadata:
            yield Setting(key, **item.metadata)


def value_at(config: Any, key: str) -> Any:
    """Return the value of a key given with dots."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def check_settings(config: Any) -> None:
    """Check every key for its range, and for having an effect beside the others.

    Raises ConfigError for the first that fails.
    """
    declared = list(settings_of(type(config)))
    # Ranges first: a mistyped schedule.name must not be reported as "cooldown does nothing"
    for setting in declared:
        check_range(setting, value_at(config, setting.key))
    for setting in declared:
        check_belongs(setting, config)


def check_ranges(config: Any, keys: Collection[str]) -> None:
    """Check some keys of a configuration, given with dots, for their ranges alone."""
    for setting in settings_of(type(config)):
        if setting.key in keys:
            check_range(setting, value_at(config, setting.key))


def check_range(setting: Setting, value: Any) -> None:
    """Raise ConfigError where a value is out of its key's range; null passes."""
    if value is None or setting.allowed is None:
        return
    # Infinity would pass "a positive number"
    numbers = value if isinstance(value, list) else [value]
    finite = all(not isinstance(number, float) or math.isfinite(number) for number in numbers)
    if not (finite and setting.allowed.allows(value)):
        raise ConfigError(f"{setting.key} must be {setting.allowed.expected}, got {value}")


def check_belongs(setting: Setting, config: Any) -> None:
    """Raise ConfigError where a key is set that does nothing beside another key's value.

    A run whose settings were silently ignored would be compared under a wrong name.
    """
    if setting.belongs is None or value_at(config, setting.key) is None:
        return
    choice = value_at(config, setting.belongs.key)
    if choice not in setting.belongs.values:
        names = ", ".join(setting.belongs.values)
        raise ConfigError(
            f"{setting.key} does nothing with {setting.belongs.key}={choice}; it belongs to {names}"
        )
