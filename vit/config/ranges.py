"""TODO: say what this file is for."""

import math
import re
from collections.abc import Callable
from typing import Any

from vit.errors import ConfigError

Check = tuple[Callable[[Any], bool], str]


POSITIVE: Check = (lambda x: x > 0, "a positive number")


NOT_NEGATIVE: Check = (lambda x: x >= 0, "0 or more")


PROBABILITY: Check = (lambda x: 0 <= x < 1, "at least 0 and below 1")


def is_duration(value: Any) -> bool:
    """A number from 0, or one of epochs as text: "5ep", "0.5ep"."""
    if isinstance(value, str):
        return re.fullmatch(r"\d+(\.\d+)?ep", value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def check_values(config: Any, checks: dict[str, Check]) -> None:
    """Raise ConfigError for the first value out of its range; null means "not set" and passes."""
    for key, (allowed, expected) in checks.items():
        value = value_at(config, key)
        numbers = value if isinstance(value, list) else [value]
        finite = all(not isinstance(number, float) or math.isfinite(number) for number in numbers)
        if value is not None and not (finite and allowed(value)):
            raise ConfigError(f"{key} must be {expected}, got {value}")
