"""Renaming by tables, in both directions."""

from pathlib import Path

import pytest
import torch

from vit.errors import CheckpointError
from vit.weights.names import (
    flatten_units,
    join_qkv,
    list_some,
    split_qkv,
    to_ours,
    to_theirs,
    translate,
    unflatten_unit,
    without_prefix,
)

TABLE = {
    "old.{}.norm": "blocks.{}.norm",
    "layer_{}.norm": "blocks.{}.norm",
    "cls": "token",
}
PATH = Path("some.file")


def test_names_are_translated_with_their_numbers_and_endings():
    names = ["layer_12.norm.weight", "layer_3.norm.bias", "cls", "layer_3.mlp.weight", "cls2"]
    tensors = {name: torch.tensor(number) for number, name in enumerate(names)}
    renamed, unknown = translate(tensors, TABLE)
    assert {name: int(tensor) for name, tensor in renamed.items()} == {
        "blocks.12.norm.weight": 0,
        "blocks.3.norm.bias": 1,
        "token": 2,
    }
    assert unknown == ["layer_3.mlp.weight", "cls2"]


def test_of_two_names_the_tables_last_is_written_as_a_contiguous_copy():
    tensor = torch.arange(6.0).reshape(2, 3).T
    written = to_theirs({"blocks.7.norm.weight": tensor}, TABLE, PATH)
    assert list(written) == ["layer_7.norm.weight"]
    copy = written["layer_7.norm.weight"]
    assert torch.equal(copy, tensor)
    assert copy.is_contiguous()
    assert copy.data_ptr() != tensor.data_ptr()


def test_unknown_names_are_refused_in_both_directions():
    tensors = {name: torch.zeros(1) for name in ("cls", "dist_token")}
    with pytest.raises(CheckpointError, match=r"some.file: their weights .* dist_token"):
        to_ours(tensors, TABLE, PATH, "their")
    tensors = {name: torch.zeros(1) for name in ("token", "surplus")}
    with pytest.raises(CheckpointError, match=r"some.file: .*surplus"):
        to_theirs(tensors, TABLE, PATH)


def test_a_fused_matrix_is_split_and_joined():
    tensors = {"a.qkv.weight": torch.randn(6, 4), "a.qkv.bias": torch.randn(6), "b": torch.ones(1)}
    parts = split_qkv(tensors, "qkv.", PATH)
    assert parts.keys() == {
        "a.query.weight",
        "a.key.weight",
        "a.value.weight",
        "a.query.bias",
        "a.key.bias",
        "a.value.bias",
        "b",
    }
    assert torch.equal(parts["a.key.weight"], tensors["a.qkv.weight"][2:4])
    joined = join_qkv(parts, "qkv.")
    assert joined.keys() == tensors.keys()
    assert all(torch.equal(joined[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("shape", [(), (0, 4), (7, 4)])
def test_what_is_no_fused_matrix_is_refused(shape):
    with pytest.raises(CheckpointError, match=r"some.file: a\.qkv\.weight is "):
        split_qkv({"a.qkv.weight": torch.zeros(shape)}, "qkv.", PATH)


def test_two_tensors_for_one_part_are_refused():
    table = {"a.{}.old": "ours.{}", "a.{}.new": "ours.{}"}
    tensors = {"a.0.old.weight": torch.zeros(1), "a.0.new.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"some.file: .* no part for a\.0\.new\.weight"):
        to_ours(tensors, table, PATH, "test")


def test_a_prefix_is_dropped_unless_two_names_become_one():
    tensors = {"vit.a": torch.zeros(1), "b": torch.zeros(1), "vit.vit.c": torch.zeros(1)}
    short = without_prefix(tensors, ("vit.", "other."), PATH)
    assert list(short) == ["a", "b", "vit.c"]
    with pytest.raises(CheckpointError, match=r"some.file: holds a twice"):
        without_prefix(tensors | {"a": torch.zeros(1)}, ("vit.",), PATH)


def test_units_are_numbered_through_the_stages_and_back():
    names = ["s1.u1.conv", "s1.u2.conv", "s2.u1.conv", "s2.u1.norm.bias", "root.conv"]
    flat = flatten_units(names, r"^s(\d+)\.u(\d+)\.")
    assert flat == {
        "s1.u1.conv": "units.0.conv",
        "s1.u2.conv": "units.1.conv",
        "s2.u1.conv": "units.2.conv",
        "s2.u1.norm.bias": "units.2.norm.bias",
    }
    for name in names:
        assert unflatten_unit(flat.get(name, name), [2, 1], "s{}.u{}", first=1) == name
    assert unflatten_unit("units.2.conv", [2, 1], "s{}.u{}", first=0) == "s1.u0.conv"


def test_a_message_lists_five_names():
    assert list_some(list("abcde")) == "a, b, c, d, e"
    assert list_some(list("abcdefg")) == "a, b, c, d, e and 2 more"
