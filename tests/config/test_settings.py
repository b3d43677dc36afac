"""What a key declares of itself: its range, and the choice of another key that it belongs to."""

import math
from dataclasses import dataclass, replace

import omegaconf
import pytest

from vit.config.settings import (
    BELOW_ONE,
    DURATION,
    FRACTION,
    FREE,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    REFUSED,
    Range,
    belongs_to,
    check_settings,
    one_of,
    setting,
    settings_of,
    value_at,
)
from vit.errors import ConfigError

PAIR = Range(lambda value: len(value) == 2, "two numbers")


@dataclass
class Engine:
    kind: str = setting(one_of("steam", "diesel"))
    pressure: float | None = setting(POSITIVE, belongs=belongs_to("engine.kind", "steam"))
    bores: list[float] | None = setting(PAIR)


@dataclass
class Ship:
    engine: Engine = omegaconf.MISSING
    name: str = setting(on_resume=FREE)


STEAMER = Ship(Engine("steam", 3.0, [1.0, 2.0]), "Sirius")


def with_engine(**changes):
    return replace(STEAMER, engine=replace(STEAMER.engine, **changes))


def test_every_key_is_declared_with_its_full_name():
    declared = {item.key: item for item in settings_of(Ship)}
    assert list(declared) == ["engine.kind", "engine.pressure", "engine.bores", "name"]
    assert declared["name"].on_resume == FREE
    assert declared["engine.kind"].on_resume == REFUSED
    assert value_at(STEAMER, "engine.pressure") == 3.0


def test_a_key_without_a_value_is_one_that_conf_forgot():
    assert Engine().kind == omegaconf.MISSING


def test_what_is_in_order_passes():
    check_settings(STEAMER)
    check_settings(with_engine(kind="diesel", pressure=None, bores=None))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"kind": "sail"}, "engine.kind"),
        ({"pressure": 0.0}, "engine.pressure"),
        ({"pressure": math.nan}, "engine.pressure"),
        ({"pressure": math.inf}, "engine.pressure"),
        ({"bores": [1.0]}, "engine.bores"),
        ({"bores": [1.0, math.inf]}, "engine.bores"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(changes, key):
    with pytest.raises(ConfigError, match=f"^{key} must be "):
        check_settings(with_engine(**changes))


def test_a_key_that_does_nothing_is_refused_with_what_it_belongs_to():
    with pytest.raises(ConfigError, match=r"^engine\.pressure .*engine\.kind=diesel.* steam$"):
        check_settings(with_engine(kind="diesel"))


def test_ranges_come_first():
    """A mistyped choice must not be told as a key that does nothing."""
    with pytest.raises(ConfigError, match=r"^engine\.kind must be one of steam, diesel, got steem"):
        check_settings(with_engine(kind="steem"))


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (POSITIVE, [1e-9, 5], [0, -1]),
        (NOT_NEGATIVE, [0, 5], [-1e-9]),
        (PROBABILITY, [0, 1], [-0.1, 1.1]),
        (BELOW_ONE, [0, 0.99], [-0.1, 1]),
        (FRACTION, [0.01, 1], [0, 1.1]),
        (DURATION, [0, 0.05, 500, "5ep", "0.5ep"], [-1, True, "5", "5 ep", "epochs", "-1ep"]),
    ],
    ids=lambda value: getattr(value, "expected", ""),
)
def test_ranges(allowed, inside, outside):
    assert all(allowed.allows(value) for value in inside)
    assert not any(allowed.allows(value) for value in outside)
