"""Images of the page: saved as PNG files beside it, and held by it as data addresses."""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vit.figures.themes import DARK, LIGHT, Theme, themed


@dataclass(frozen=True)
class PageImage:
    """An image, with text that stands in for it. Figures have a second one for dark pages."""

    alt: str
    address: str
    dark_address: str | None = None


def save_figure(folder: Path, name: str, alt: str, draw: Callable[[Theme], Figure]) -> PageImage:
    """Save draw(theme) as NAME.png and NAME_dark.png. Raises OSError."""
    addresses = []
    for theme in (LIGHT, DARK):
        path = folder / f"{name}{theme.suffix}.png"
        with themed(theme):
            draw(theme).savefig(path)
        addresses.append(data_address(path))
    return PageImage(alt, *addresses)


def save_pixels(folder: Path, name: str, alt: str, pixels: Tensor) -> PageImage:
    """Save (3 or 4, height, width) in 0..1 as NAME.png; a fourth channel is the opacity.

    Raises OSError.
    """
    path = folder / f"{name}.png"
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    Image.fromarray(values.permute(1, 2, 0).cpu().numpy()).save(path, optimize=True)
    return PageImage(alt, data_address(path))


def data_address(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
