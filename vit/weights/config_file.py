"""The JSON files beside weights, such as config.json, checked field by field.

They come from elsewhere and may hold anything: a field of the wrong type is a mistake in the file,
to be named with its key, and never a crash further on.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit.errors import CheckpointError
from vit.files import read_json
from vit.text import shorten

# Characters of a wrong value that a message shows
SHOWN = 60


@dataclass(frozen=True)
class Kind:
    """The values a field may hold: a test, and the same in words for the error message."""

    allows: Callable[[Any], bool]
    expected: str


def is_count(value: Any) -> bool:
    """Whether it is a positive whole number; True is one to Python, but not here."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: Any) -> bool:
    """Whether it is a number; Python reads NaN, Infinity and 1e999 from JSON, none of them one."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def is_size(value: Any) -> bool:
    """Whether it is one positive whole number or two of them, as sizes of images are given."""
    is_pair = isinstance(value, list) and len(value) == 2 and all(map(is_count, value))
    return is_count(value) or is_pair


def is_label_table(value: Any) -> bool:
    """Whether it maps the numbers of classes, as text, to names."""
    if not isinstance(value, dict):
        return False
    return all(key.isdecimal() and isinstance(name, str) for key, name in value.items())


def is_list_of(allows: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A test for a list, not empty, of values that another test allows."""
    return lambda value: isinstance(value, list) and len(value) > 0 and all(map(allows, value))


FLAG = Kind(lambda value: isinstance(value, bool), "true or false")
TEXT = Kind(lambda value: isinstance(value, str), "text")
COUNT = Kind(is_count, "a positive whole number")
INDEX = Kind(lambda value: value == 0 or is_count(value), "a whole number from 0")
POSITIVE = Kind(lambda value: is_number(value) and value > 0, "a positive number")
SIZE = Kind(is_size, "a positive whole number or two of them")
OBJECT = Kind(lambda value: isinstance(value, dict), "an object")
SIDES = Kind(
    lambda value: is_size(value) or isinstance(value, dict),
    f"{SIZE.expected}, or an object",
)
NUMBERS = Kind(is_list_of(is_number), "a list of numbers")
SCALES = Kind(is_list_of(POSITIVE.allows), "a list of positive numbers")
COUNTS = Kind(is_list_of(is_count), "a list of positive whole numbers")
NAMES = Kind(
    lambda value: is_label_table(value) or is_list_of(TEXT.allows)(value),
    "names, as a list or by their numbers",
)
LABELS = Kind(is_label_table, "names by their numbers")


@dataclass(frozen=True)
class ConfigFile:
    """The object in a JSON file; without a file it has no fields."""

    path: Path
    fields: dict[str, Any]

    def __bool__(self) -> bool:
        return bool(self.fields)

    def __contains__(self, key: str) -> bool:
        """Whether a field is set; null counts as not set, as it does in these files."""
        return self.fields.get(key) is not None

    def get(self, key: str, kind: Kind, default: Any = None) -> Any:
        """A field's value, or the default where it isn't set.

        Raises CheckpointError, which names the file and the key, where it is of another kind.
        """
        if key not in self:
            return default
        value = self.fields[key]
        if not kind.allows(value):
            raise CheckpointError(
                f"{self.path}: {key} must be {kind.expected}, got {shorten(repr(value), SHOWN)}"
            )
        return value

    def part(self, key: str) -> "ConfigFile":
        """The object in a field, without any fields where there is none."""
        return ConfigFile(self.path, self.get(key, OBJECT, {}))


def read_config(path: Path) -> ConfigFile:
    """Read the object in a JSON file.

    Raises CheckpointError where the file can't be read, is not JSON in UTF-8, or holds no object.
    """
    try:
        fields = read_json(path)
    # Lists in lists in lists … end in a RecursionError
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not readable as JSON ({error}); repair it, or move the weights elsewhere"
        ) from None
    if not isinstance(fields, dict):
        raise CheckpointError(
            f"{path}: holds {shorten(repr(fields), SHOWN)} instead of a JSON object; repair it, or "
            "move the weights elsewhere"
        )
    return ConfigFile(path, fields)


def read_config_of(key: str, library: str, weights: Path) -> ConfigFile:
    """Read the config.json beside a file of weights, which has no fields where there is none.

    key: the field by which it names its kind of model. Raises CheckpointError as read_config does,
    and where there is a file without this field: it is of another library than the weights.
    """
    config = read_config(weights.parent / "config.json")
    if config and key not in config:
        model = model_name(config)
        stated = f"is of {model}" if model else f"names no {key}"
        raise CheckpointError(
            f"{config.path}: {stated}, but the tensors in {weights.name} are named as "
            f"{library}'s; move them elsewhere if they belong to another model"
        )
    return config


def read_processor(folder: Path) -> ConfigFile:
    """Read how images are prepared for the weights in a folder; no fields where it isn't said.

    That is the preprocessor_config.json or, before it, the part for images of the
    processor_config.json in which transformers 5 states images and text together (CLIP, SigLIP).
    """
    together = read_config(folder / "processor_config.json")
    if "image_processor" in together:
        return together.part("image_processor")
    return read_config(folder / "preprocessor_config.json")


def model_name(config: ConfigFile) -> str | None:
    """The kind of model that a config.json is of, as Hugging Face and timm name it."""
    return config.get("model_type", TEXT) or config.get("architecture", TEXT)
