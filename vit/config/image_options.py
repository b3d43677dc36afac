"""Options of the commands that take images, vit.predict and vit.embed; checks for others too."""

import argparse
import sys
from collections.abc import Mapping

from vit.errors import ConfigError

# Where memory ends: batches have been halved down to a single image by then
TOO_LITTLE_MEMORY = "a single image is too much for this device; try --device cpu"


def add_computing(parser: argparse.ArgumentParser) -> None:
    """Add how many images are computed at once, where, and who decodes them."""
    parser.add_argument("--batch-size", type=int, default=64, help="images at once (default: 64)")
    parser.add_argument(
        "--workers",
        type=int,
        help="processes that decode images (default: one per core where there are many images, "
        "eight at most)",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))


def check_minima(options: argparse.Namespace, minima: Mapping[str, int]) -> None:
    """Raise ConfigError for a number below its minimum; minima: by the attributes' names."""
    for name, minimum in minima.items():
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise ConfigError(f"{flag_of(name)} must be {minimum} or more, got {value}")


def flag_of(name: str) -> str:
    """Return the flag of an attribute: --batch-size of batch_size."""
    return f"--{name.replace('_', '-')}"


def require_images(options: argparse.Namespace) -> None:
    """Raise ConfigError where no images are named and none come from a pipe."""
    # Waiting for paths to be typed would look like a command that hangs
    if not options.images and sys.stdin.isatty():
        raise ConfigError(
            "no images: give files, folders or 'patterns*', or pipe their paths in, one per line"
        )
