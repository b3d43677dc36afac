"""One page of queries beside their nearest neighbors; vit/report/similar.html lays it out.

The page needs no other file: it holds a small copy of each image, and runs no script.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from vit.data.image_files import open_image
from vit.data.labeled_sources import LabeledImage
from vit.errors import DataError
from vit.features.files import FeatureFile, as_utf8
from vit.features.neighbors import nearest_rows
from vit.report.page import environment
from vit.text import shorten

# Pixels of the longer side
SIDE = 160
# Images of at most so many a side are shown pixel by pixel, as a person should see them
FEW_PIXELS = 48
JPEG_QUALITY = 85

# Characters of a name and of a label under an image; the whole path shows when pointed at
MAX_NAME = 40


class Query(NamedTuple):
    """An image to look for. row: its row in the file of features, None where it is not of it."""

    image: LabeledImage
    row: int | None


@dataclass(frozen=True)
class Shown:
    """An image on the page.

    address: a small copy as a data address, None where it can't be read any more.
    score: its cosine similarity to the query, None for the query itself.
    same: whether its label is the query's, None where one of them is not known.
    """

    path: str
    label: str
    address: str | None
    score: float | None = None
    same: bool | None = None

    @property
    def name(self) -> str:
        """The file and its folder, of which the end tells most."""
        name = "/".join(self.path.split("/")[-2:])
        return name if len(name) <= MAX_NAME else "…" + name[-MAX_NAME + 1 :]

    @property
    def short_label(self) -> str:
        return shorten(self.label, MAX_NAME)

    @property
    def is_pixels(self) -> bool:
        """Whether it is to be enlarged pixel by pixel."""
        return self.address is not None and self.address.startswith("data:image/png")


def similar_page(file: FeatureFile, queries: Sequence[Query], features: Tensor, count: int) -> str:
    """The HTML of a page that shows each query beside its `count` nearest neighbors in a file.

    features: of the queries, float32 (Q, D). A query is not among its own neighbors. Where an
    image can't be read any more, the page says so.
    """
    # One more, as the nearest of all may be the query itself
    scores, rows = nearest_rows(file, features, count + 1)
    wanted = sorted(set(rows.flatten().tolist()))
    images = dict(zip(wanted, file.images(wanted), strict=True))
    copies = Copies()
    shown: list[tuple[Shown, list[Shown]]] = []
    for query, its_scores, its_rows in zip(queries, scores.tolist(), rows.tolist(), strict=True):
        neighbors = [
            copies.show(images[row], score, query.image.label)
            for row, score in zip(its_rows, its_scores, strict=True)
            if row != query.row and images[row].path != query.image.path
        ]
        shown.append((copies.show(query.image), neighbors[:count]))
    template = environment().get_template("similar.html")
    page = template.render(
        about=file.about,
        images=file.rows,
        width=file.width,
        queries=shown,
        agreement=agreement(shown),
    )
    return as_utf8(page)


def agreement(queries: Sequence[tuple[Shown, list[Shown]]]) -> float | None:
    """The fraction of neighbors that have their query's label; None where none is known."""
    known = [one.same for _, neighbors in queries for one in neighbors if one.same is not None]
    return sum(known) / len(known) if known else None


class Copies:
    """Small copies of images, each made once."""

    def __init__(self) -> None:
        self.addresses: dict[str, str | None] = {}

    def show(self, image: LabeledImage, score: float | None = None, query_label: str = "") -> Shown:
        """An image as the page holds it. score: None for a query."""
        if image.path not in self.addresses:
            self.addresses[image.path] = small_copy(image.path)
        known = bool(image.label and query_label)
        same = image.label == query_label if known else None
        return Shown(image.path, image.label, self.addresses[image.path], score, same)


def small_copy(path: str) -> str | None:
    """An image as a data address: a JPEG, or of few pixels a PNG of all of them; None for none."""
    try:
        image = open_image(path)
    except DataError:
        return None
    kind, options = "PNG", {}
    if max(image.size) > FEW_PIXELS:
        image.thumbnail((SIDE, SIDE))
        kind, options = "JPEG", {"quality": JPEG_QUALITY}
    content = io.BytesIO()
    image.save(content, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"
