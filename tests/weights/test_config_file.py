"""JSON beside weights: fields are checked by type, and a mistake names the file and the key."""

import pytest

from vit.errors import CheckpointError
from vit.weights.config_file import (
    COUNT,
    COUNTS,
    FLAG,
    INDEX,
    LABELS,
    NAMES,
    NUMBERS,
    POSITIVE,
    SCALES,
    SIDES,
    SIZE,
    TEXT,
    ConfigFile,
    model_name,
    read_config,
    read_config_of,
)


def test_a_file_that_is_not_there_has_no_fields(tmp_path):
    config = read_config(tmp_path / "config.json")
    assert not config
    assert config.get("anything", TEXT, "default") == "default"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not readable as JSON"),
        (b"", "not readable as JSON"),
        (b'{"a": "\xe4"}', "not readable as JSON .*utf-8"),
        (b"[" * 100_000, "not readable as JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not readable as JSON"),
        (b"[1, 2]", r"holds \[1, 2\] instead of a JSON object"),
        (b"12", "holds 12 instead"),
        (b"null", "holds None instead"),
        (b'"' + b"x" * 1000 + b'"', "holds 'xxx.*… instead"),
    ],
    ids=range(9),
)
def test_a_file_without_an_object_is_refused(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 250


def test_a_folder_in_its_place_is_refused(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: not readable"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (FLAG, [True, False], [0, 1, "true"]),
        (TEXT, ["", "gelu"], [1, ["gelu"]]),
        (COUNT, [1, 10**30], [0, -1, 1.0, True, "twelve"]),
        (INDEX, [0, 3], [-1, "0", 0.5]),
        (POSITIVE, [1, 1e-12], [0, -1.0, float("nan"), float("inf"), 10**400, True, "1e-6"]),
        (SIZE, [224, [224, 192]], [0, [224], [224, 0], [1, 2, 3], "224", {"height": 224}]),
        (SIDES, [224, [224, 192], {"height": 224}], ["224", [224]]),
        (NUMBERS, [[0.5], [-1, 0]], [[], 0.5, ["0.5"], [True]]),
        (SCALES, [[0.5]], [[0], [], [0.5, -1]]),
        (COUNTS, [[3, 224, 224]], [[], [3, 0], 3]),
        (LABELS, [{}, {"0": "cat"}], [["cat"], {"0": 1}, {"first": "cat"}, {"²": "cat"}]),
        (NAMES, [["cat"], {"0": "cat"}], [[], [1], "cat", {"first": "cat"}]),
    ],
    ids=lambda value: getattr(value, "expected", None),
)
def test_kinds_of_fields(tmp_path, kind, good, bad):
    path = tmp_path / "config.json"
    for value in good:
        assert ConfigFile(path, {"key": value}).get("key", kind) == value
    for value in bad:
        with pytest.raises(CheckpointError, match="key must be") as caught:
            ConfigFile(path, {"key": value}).get("key", kind)
        assert str(caught.value).startswith(f"{path}: key must be {kind.expected}, got ")


def test_null_counts_as_not_set(tmp_path):
    config = ConfigFile(tmp_path, {"key": None})
    assert "key" not in config
    assert config.get("key", COUNT, 7) == 7
    assert config.part("key").fields == {}


def test_a_part_must_be_an_object(tmp_path):
    config = ConfigFile(tmp_path, {"part": {"size": 3}, "list": [1]})
    assert config.part("part").get("size", COUNT) == 3
    with pytest.raises(CheckpointError, match="list must be an object"):
        config.part("list")


def test_a_config_of_another_library_is_refused(tmp_path):
    weights, path = tmp_path / "x.bin", tmp_path / "config.json"
    assert not read_config_of("architecture", "timm", weights)
    path.write_text('{"model_type": "vit"}')
    assert model_name(read_config_of("model_type", "Hugging Face", weights)) == "vit"
    with pytest.raises(CheckpointError, match=r"is of vit, but the tensors in x\.bin are .* timm"):
        read_config_of("architecture", "timm", weights)
    path.write_text('{"learning_rate": 1}')
    with pytest.raises(CheckpointError, match="names no architecture, but the tensors"):
        read_config_of("architecture", "timm", weights)
