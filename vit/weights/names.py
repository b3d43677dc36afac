"""Renaming between this project's tensors and another's, by tables that work in both directions.

A table holds {their name: our name}. A name loses .weight or .bias before it is looked up, and a block's number stands as {}.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vit.errors import CheckpointError

PATCHES, POSITIONS, CLS = (
    "embeddings.patch_embedding.",
    "embeddings.position_embedding",
    "embeddings.cls_token",
)


ROOT = PATCHES + "stem.conv.weight"


NUMBER = re.compile(r"(?<=[._])\d+(?=\.)")


def unit_map(norm: str, projection: str, projection_norm: str) -> dict[str, str]:
    """The parts of a ResNet's units, whose numbers run on through the stages; see flat_units."""
    ours = PATCHES + "stem.blocks.{}."
    return {
        **{f"units.{{}}.conv{i}": f"{ours}conv{i}" for i in (1, 2, 3)},
        **{f"units.{{}}.{norm}{i}": f"{ours}norm{i}" for i in (1, 2, 3)},
        f"units.{{}}.{projection}": ours + "downsample.0",
        f"units.{{}}.{projection_norm}": ours + "downsample.1",
    }


def list_some(names: list[str]) -> str:
    """A few of many names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def translate(
    tensors: Mapping[str, Tensor], table: Mapping[str, str]
) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors by the names that the table gives theirs, names that are not in the table)."""
    renamed, unknown = {}, []
    for name, tensor in tensors.items():
        kind = next((kind for kind in (".weight", ".bias") if name.endswith(kind)), "")
        stem = name.removesuffix(kind)
        new = table.get(NUMBER.sub("{}", stem))
        if new is None:
            unknown.append(name)
        else:
            renamed[new.format(*NUMBER.findall(stem)) + kind] = tensor
    return renamed, unknown


def to_ours(
    tensors: Mapping[str, Tensor], table: Mapping[str, str], path: Path, kind: str
) -> dict[str, Tensor]:
    """translate(), raising CheckpointError, which lists them, where the table lacks names."""
    renamed, unknown = translate(tensors, table)
    if unknown:
        raise CheckpointError(
            f"{path}: {kind} weights of another architecture than a plain ViT's: this project has no part "
            f"for {list_some(unknown)}; only ViT classifiers can be loaded"
        )
    return renamed


def to_theirs(tensors: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """translate() the other way. Where several of their names mean one of ours, the table's last is written."""
    renamed, unknown = translate(tensors, {ours: theirs for theirs, ours in table.items()})
    assert not unknown, unknown
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in renamed.items()
    }


def split_qkv(tensors: Mapping[str, Tensor], fused: str) -> dict[str, Tensor]:
    """Cut the tensors whose name holds `fused` into query., key. and value."""
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if fused in name:
            parts |= {
                name.replace(fused, f"{part}."): piece.clone()
                for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            }
        else:
            parts[name] = tensor
    return parts


def join_qkv(tensors: Mapping[str, Tensor], fused: str) -> dict[str, Tensor]:
    """The inverse of split_qkv."""
    joined = {}
    for name, tensor in tensors.items():
        if ".query." in name:
            pieces = [
                tensors[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")
            ]
            joined[name.replace(".query.", f".{fused}")] = torch.cat(pieces)
        elif ".key." not in name and ".value." not in name:
            joined[name] = tensor
    return joined


def flat_units(names: list[str], pattern: str) -> dict[str, str]:
    """{their name: units.<number>.…} of a ResNet's units, which are numbered stage by stage; pattern has two groups."""
    found = {name: match for name in names if (match := re.search(pattern, name))}
    places = sorted({(int(match[1]), int(match[2])) for match in found.values()})
    return {
        name: f"units.{places.index((int(match[1]), int(match[2])))}.{name[match.end() :]}"
        for name, match in found.items()
    }


def place_unit(name: str, stages: list[int], form: str, first: int) -> str:
    """The inverse of flat_units for one name: `form` takes the stage and the unit in it, counted from `first`."""
    places = [
        (stage, unit)
        for stage, units in enumerate(stages, first)
        for unit in range(first, units + first)
    ]
    return re.sub(r"^units\.(\d+)", lambda match: form.format(*places[int(match[1])]), name)
