"""Nearest neighbors by cosine similarity, block by block, so that any number of rows fits."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vit.features.files import FeatureFile


def spread_evenly(rows: int, count: int) -> list[int]:
    """`count` of the rows in order, in the middle of equal parts; all where there are fewer."""
    count = min(count, rows)
    return [(2 * number + 1) * rows // (2 * count) for number in range(count)]


def take_rows(file: FeatureFile, rows: Sequence[int]) -> Tensor:
    """The features of some rows, float32 (len(rows), D)."""
    found: dict[int, Tensor] = {}
    start = 0
    for block in file.blocks():
        for row in rows:
            if start <= row < start + len(block):
                found[row] = torch.tensor(block[row - start])
        start += len(block)
    return torch.stack([found[row] for row in rows])


def nearest_rows(file: FeatureFile, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` rows most similar to each query, fewer where the file has fewer.

    queries: float32 (Q, D). Returns (cosine similarities, falling; rows, int64), (Q, count) each.
    """
    queries = F.normalize(queries, dim=1)
    scores = torch.empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64)
    start = 0
    for block in file.blocks():
        similarities = queries @ F.normalize(torch.tensor(block), dim=1).T
        best = similarities.topk(min(count, len(block)), dim=1)
        scores = torch.cat([scores, best.values], dim=1)
        rows = torch.cat([rows, best.indices + start], dim=1)
        # The best so far are enough: none of the others can come back
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
        scores, rows = scores.gather(1, order), rows.gather(1, order)
        start += len(block)
    return scores, rows
