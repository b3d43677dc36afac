"""Renaming tensors between this project and other libraries, by tables that work both ways.

A table is {their name: our name}, without the endings .weight and .bias, and with {} for numbers.
The row "blocks.{}.norm1": "encoder.blocks.{}.norm1" covers both tensors of that norm in all blocks.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vit.errors import CheckpointError

# Our names that several formats need
PATCHES = "embeddings.patch_embedding."
POSITIONS = "embeddings.position_embedding"
CLS = "embeddings.cls_token"
DISTILL = "embeddings.distill_token"
REGISTERS = "embeddings.registers"
PROBE = "attention_pool.probe"
BLOCK = "encoder.blocks.{}."
ROOT = PATCHES + "stem.conv.weight"  # the hybrid ResNet's first convolution

QKV = ("query", "key", "value")

# A number that is a whole part of a name, or ends one as in encoderblock_3
NUMBER = re.compile(r"(?<=[._])\d+(?=\.)")


def unit_map(norm: str, projection: str, projection_norm: str) -> dict[str, str]:
    """The rows of a table for the hybrid ResNet's units, under the names of flatten_units.

    The arguments are their names for a norm, the shortcut's convolution, and its norm.
    """
    ours = PATCHES + "stem.blocks.{}."
    table = {}
    for number in (1, 2, 3):
        table[f"units.{{}}.conv{number}"] = f"{ours}conv{number}"
        table[f"units.{{}}.{norm}{number}"] = f"{ours}norm{number}"
    table[f"units.{{}}.{projection}"] = f"{ours}downsample.0"
    table[f"units.{{}}.{projection_norm}"] = f"{ours}downsample.1"
    return table


def list_some(names: Sequence[str]) -> str:
    """The first five of many names, for a message."""
    text = ", ".join(names[:5])
    return text if len(names) <= 5 else f"{text} and {len(names) - 5} more"


def without_prefix(
    tensors: Mapping[str, Tensor], prefixes: Sequence[str], path: Path
) -> dict[str, Tensor]:
    """The tensors without the first of these prefixes that their names begin with.

    Raises CheckpointError where two names become one.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        short_name = name.removeprefix(prefix)
        if short_name in renamed:
            raise CheckpointError(f"{path}: holds {short_name} twice, with {prefix} and without")
        renamed[short_name] = tensor
    return renamed


def translate_name(name: str, table: Mapping[str, str]) -> str | None:
    """The name that the table gives for a tensor, or None where it has no row for it."""
    ending = ""
    if name.endswith((".weight", ".bias")):
        # One row for both tensors of a layer
        ending = name[name.rindex(".") :]
    stem = name.removesuffix(ending)
    translated = table.get(NUMBER.sub("{}", stem))
    if translated is None:
        return None
    return translated.format(*NUMBER.findall(stem)) + ending


def translate(
    tensors: Mapping[str, Tensor], table: Mapping[str, str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename tensors by a table.

    Returns them, and the names that have no place: the table has no row for them, or another tensor
    has taken it.
    """
    renamed, unknown = {}, []
    for name, tensor in tensors.items():
        new_name = translate_name(name, table)
        if new_name is None or new_name in renamed:
            unknown.append(name)
        else:
            renamed[new_name] = tensor
    return renamed, unknown


def to_ours(
    tensors: Mapping[str, Tensor], table: Mapping[str, str], path: Path, kind: str
) -> dict[str, Tensor]:
    """Bring a file's tensors under our names.

    Raises CheckpointError, which lists them, where there are tensors that the table doesn't know,
    or two for one part.
    """
    renamed, unknown = translate(tensors, table)
    if unknown:
        raise CheckpointError(
            f"{path}: {kind} weights of another architecture than a plain ViT: this project has "
            f"no part for {list_some(unknown)}; only ViT classifiers can be loaded"
        )
    return renamed


def to_theirs(
    tensors: Mapping[str, Tensor], table: Mapping[str, str], path: Path
) -> dict[str, Tensor]:
    """Bring our tensors under the names of a table, as contiguous copies on the CPU.

    Where several of their names mean one of ours, the table's last is taken. Raises CheckpointError
    for tensors that the table doesn't know, as a file with surplus tensors has.
    """
    # Of several rows with the same value the last stays.
    inverse = {ours: theirs for theirs, ours in table.items()}
    renamed, unknown = translate(tensors, inverse)
    if unknown:
        raise CheckpointError(
            f"{path}: no part of a ViT classifier: {list_some(unknown)}; this format has no name "
            "for it, so remove it from the file"
        )
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in renamed.items()
    }


def split_qkv(tensors: Mapping[str, Tensor], fused: str, path: Path) -> dict[str, Tensor]:
    """Cut fused tensors into query, key and value.

    fused: what stands in the name of a fused tensor where query., key. or value. is to stand.
    Raises CheckpointError where a tensor has no three equal parts.
    """
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if fused not in name:
            parts[name] = tensor
            continue
        if tensor.dim() == 0 or tensor.shape[0] % 3 or tensor.shape[0] == 0:
            raise CheckpointError(
                f"{path}: {name} is {tuple(tensor.shape)}, no query, key and value in one"
            )
        for part, piece in zip(QKV, tensor.chunk(3), strict=True):
            parts[name.replace(fused, f"{part}.")] = piece.clone()
    return parts


def join_qkv(tensors: Mapping[str, Tensor], fused: str) -> dict[str, Tensor]:
    """The inverse of split_qkv."""
    joined = {}
    for name, tensor in tensors.items():
        if ".query." in name:
            pieces = [tensors[name.replace(".query.", f".{part}.")] for part in QKV]
            joined[name.replace(".query.", f".{fused}")] = torch.cat(pieces)
        elif ".key." not in name and ".value." not in name:
            joined[name] = tensor
    return joined


def flatten_units(names: Sequence[str], pattern: str) -> dict[str, str]:
    """Number the units of a ResNet through all stages, as ours are: {their name: units.<number>.…}.

    pattern: matches the beginning of their names, with the stage and the unit in it as two groups.
    Names that don't match are left out.
    """
    matches = {name: match for name in names if (match := re.search(pattern, name))}
    units = sorted({(int(match[1]), int(match[2])) for match in matches.values()})
    flat = {}
    for name, match in matches.items():
        number = units.index((int(match[1]), int(match[2])))
        flat[name] = f"units.{number}.{name[match.end() :]}"
    return flat


def unflatten_unit(name: str, stages: Sequence[int], template: str, first: int) -> str:
    """The inverse of flatten_units for one name; other names come back as they are.

    stages: the number of units in each. template: takes the stage and the unit in it, both counted
    from `first`.
    """
    match = re.match(r"units\.(\d+)", name)
    if match is None:
        return name
    units = [
        (stage, unit)
        for stage, num_units in enumerate(stages, first)
        for unit in range(first, num_units + first)
    ]
    return template.format(*units[int(match[1])]) + name[match.end() :]
