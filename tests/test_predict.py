"""python -m vit.predict: its answers, their order, and what it says of what it can't read."""

import csv
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL_BLOCKS
from limited_memory import memory_of
from PIL import Image

import vit.checkpoints.model
from vit.checkpoints.file import write_checkpoint
from vit.checkpoints.model import build_model, load, load_with_header
from vit.data.preprocessing import Preprocessing
from vit.errors import run_command
from vit.model.vision_transformer import VisionTransformer
from vit.predict import main

SIZE = (16, 24)
CLASSES = ["cat", 'größer, "dog"', "鳥"]

# The images of the fixture, in the order of their paths: a folder's files, then its folders
NAMES = (
    "a b.png",
    "clear.png",
    "gray.png",
    "print.jpg",
    "two\nlines.png",
    "ünï 鳥.png",
    "below/deep.png",
    'below/z, "q".png',
)
MODES = {
    "a b.png": "RGB",
    "clear.png": "RGBA",
    "gray.png": "L",
    "print.jpg": "CMYK",
    "two\nlines.png": "RGB",
    "ünï 鳥.png": "P",
    "below/deep.png": "I;16",
    'below/z, "q".png': "1",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of three classes, some with awkward names."""
    torch.manual_seed(0)
    config = {
        "name": "tiny",
        "image_size": list(SIZE),
        **SMALL_BLOCKS,
    }
    model = build_model(config, 3)
    assert isinstance(model, VisionTransformer)
    torch.nn.init.normal_(model.head.weight)
    header = {
        "kind": "best",
        "config": {"model": config},
        "classes": CLASSES,
        "preprocessing": Preprocessing(SIZE, 3, (0.5,), (0.5,), None, "bilinear").to_dict(),
        "precision": "fp32",
    }
    path = tmp_path_factory.mktemp("checkpoint") / "best.safetensors"
    write_checkpoint(path, model.state_dict(), header)
    return path


@pytest.fixture
def images(tmp_path):
    """Images of every mode and with awkward names, in a folder with a folder in it."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for name, mode in MODES.items():
        pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        if mode == "I;16":
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)
        else:
            image = Image.fromarray(pixels).convert(mode)
        image.save(folder / name)
    return folder


def predict(*arguments) -> int:
    """Run the command in this process; return its exit code."""
    return run_command("vit.predict", lambda: main([str(argument) for argument in arguments]))


def expected_probabilities(checkpoint, path) -> torch.Tensor:
    model = load(checkpoint)
    with torch.no_grad():
        return model(model.preprocessing(path)[None])[0].softmax(dim=0)


def paths_in_order(folder) -> list[str]:
    return [str(folder / name) for name in NAMES]


def parse_json(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def all_predictions(rows: list[dict]) -> list[dict]:
    return [prediction for row in rows for prediction in row["predictions"]]


def test_probabilities_are_the_models_in_the_order_given(checkpoint, images, capsys):
    gray = images / "gray.png"
    options = ("--format", "json", "--top-k", 9, "--batch-size", 3)
    # Images before the options and after them are one list
    assert predict(checkpoint, gray, *options, images, gray) == 0
    rows = parse_json(capsys.readouterr().out)
    assert [row["image"] for row in rows] == [str(gray), *paths_in_order(images), str(gray)]
    for row in rows:
        expected = expected_probabilities(checkpoint, row["image"])
        predictions = row["predictions"]
        assert len(predictions) == 3  # no more classes than there are
        probabilities = [prediction["probability"] for prediction in predictions]
        assert probabilities == pytest.approx(sorted(expected.tolist(), reverse=True), rel=1e-4)
        classes = [prediction["class"] for prediction in predictions]
        assert classes == expected.argsort(descending=True).tolist()
        labels = [prediction["label"] for prediction in predictions]
        assert labels == [CLASSES[index] for index in classes]


def test_workers_and_batches_change_no_answer(checkpoint, images, capsys):
    results = []
    for options in (
        ("--workers", 0),
        ("--workers", 2, "--batch-size", 2),
        ("--workers", 1, "--batch-size", 1),
    ):
        assert predict(checkpoint, images, images, "--format", "json", *options) == 0
        results.append(parse_json(capsys.readouterr().out))
    first, *others = results
    assert [row["image"] for row in first] == 2 * paths_in_order(images)
    expected = [prediction["probability"] for prediction in all_predictions(first)]
    for rows in others:
        assert [row["image"] for row in rows] == [row["image"] for row in first]
        probabilities = [prediction["probability"] for prediction in all_predictions(rows)]
        assert probabilities == pytest.approx(expected, rel=1e-4)


def test_csv_holds_the_same_as_json(checkpoint, images, tmp_path, capsys):
    predict(checkpoint, images, "--format", "json", "--top-k", 2)
    expected = [
        (row["image"], prediction["label"], pytest.approx(prediction["probability"], rel=1e-4))
        for row in parse_json(capsys.readouterr().out)
        for prediction in row["predictions"]
    ]
    out = tmp_path / "predictions.csv"
    predict(checkpoint, images, "--format", "csv", "--top-k", 2, "--out", out)
    assert "8 images" in capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO(out.read_bytes().decode(), newline="")))
    assert list(rows[0]) == ["image", "rank", "class", "label", "probability"]
    result = [(row["image"], row["label"], float(row["probability"])) for row in rows]
    assert result == expected
    assert [row["rank"] for row in rows] == ["1", "2"] * 8
    assert [row["label"] for row in rows] == [CLASSES[int(row["class"])] for row in rows]


def test_the_table_holds_the_same_as_json(checkpoint, images, capsys):
    predict(checkpoint, images, "--format", "json", "--top-k", 2)
    expected = all_predictions(parse_json(capsys.readouterr().out))
    predict(checkpoint, images, "--top-k", 2, "--batch-size", 3)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["image", "label", "probability"]
    parsed = [re.fullmatch(r"(.*?) {2,}(\S.*?) {2,}([\d.]+)%", line).groups() for line in lines]
    shown_paths = [image for image, _, _ in parsed if image]
    assert shown_paths == [path.replace("\n", "\\n") for path in paths_in_order(images)]
    labels = [label for _, label, _ in parsed]
    assert labels == [prediction["label"] for prediction in expected]
    percents = [float(percent) for _, _, percent in parsed]
    expected_percents = [100 * prediction["probability"] for prediction in expected]
    assert percents == pytest.approx(expected_percents, abs=0.006)


def test_unreadable_images_are_reported_and_left_out(checkpoint, images, tmp_path, capsys):
    (images / "cut.jpg").write_bytes((images / "print.jpg").read_bytes()[:300])
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    names = ("missing.png", images, tmp_path / "empty", tmp_path / "no*.png", tmp_path / "pipe.png")
    assert predict(checkpoint, *names, "--format", "json") == 2
    output = capsys.readouterr()
    assert [row["image"] for row in parse_json(output.out)] == paths_in_order(images)
    *lines, last = output.err.splitlines()
    unreadable = ("missing.png: ", "cut.jpg: ", "empty: ", "no*.png: ", "pipe.png: ")
    assert len(lines) == len(unreadable)
    for line, name in zip(lines, unreadable, strict=True):
        assert name in line
    assert "5 of 13" in last


@pytest.mark.parametrize("dash", [["-"], []])
@pytest.mark.parametrize("empty", [False, True])
def test_paths_from_a_pipe(checkpoint, images, dash, empty, capsys, monkeypatch):
    lines = ["", str(images / "a b.png"), str(images / "ünï 鳥.png"), str(images / "below")]
    text = "" if empty else "\n".join(lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert predict(checkpoint, *dash, "--format", "json") == (2 if empty else 0)
    paths = [row["image"] for row in parse_json(capsys.readouterr().out)]
    assert paths == ([] if empty else [*lines[1:3], *paths_in_order(images)[-2:]])


def test_a_name_that_is_not_unicode(checkpoint, images, tmp_path, capfd):
    name = os.fsencode(images) + b"/caf\xe9.png"
    os.rename(images / "a b.png", name)
    for kind in ("json", "csv"):
        out = tmp_path / kind
        predict(checkpoint, os.fsdecode(name), "--format", kind, "--out", out, "--top-k", 1)
    assert parse_json((tmp_path / "json").read_text())[0]["image"] == os.fsdecode(name)
    assert name in (tmp_path / "csv").read_bytes()
    predict(checkpoint, os.fsdecode(name))
    assert "caf\\udce9.png" in capfd.readouterr().out


def test_answers_and_overlays_are_the_same_where_memory_ends(
    checkpoint, images, tmp_path, capsys, monkeypatch
):
    options = ("--format", "json", "--attention")
    assert predict(checkpoint, images, *options, tmp_path / "expected") == 0
    expected = parse_json(capsys.readouterr().out)
    model, header = load_with_header(checkpoint)
    monkeypatch.setattr(vit.checkpoints.model, "load_with_header", lambda path: (model, header))
    # Predictions and traces both come by the classifier
    with memory_of(model.head, 3):
        assert predict(checkpoint, images, *options, tmp_path / "maps") == 0
    output = capsys.readouterr()
    rows = parse_json(output.out)
    assert [row["image"] for row in rows] == [row["image"] for row in expected]
    for ours, theirs in zip(all_predictions(rows), all_predictions(expected), strict=True):
        assert ours == theirs | {"probability": pytest.approx(theirs["probability"], rel=1e-5)}
    assert "vit.predict: memory ended with 8 images at once: from here on 4" in output.err
    names = sorted(path.name for path in (tmp_path / "expected").iterdir())
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == names
    assert len(names) == len(NAMES)

    with memory_of(model.head, 0):
        assert predict(checkpoint, images, "--format", "json") == 2
    assert "vit.predict: out of memory (" in capsys.readouterr().err


def test_kernels_of_attention_are_settled_before_any_answer(checkpoint, images, monkeypatch):
    settled = []
    monkeypatch.setattr(
        "vit.runtime.attention_kernels.exclude_faulty_attention",
        lambda device, model: settled.append(model.classes),
    )
    assert predict(checkpoint, images / "gray.png") == 0
    assert settled == [CLASSES]


def test_overlays_of_attention(checkpoint, images, tmp_path):
    maps = tmp_path / "maps"
    assert predict(checkpoint, images, "--attention", maps, "--batch-size", 5) == 0
    files = sorted(maps.iterdir())
    names = [file.name for file in files]
    assert names[:3] == ["000001_a b.png", "000002_clear.png", "000003_gray.png"]
    assert len(names) == 8
    # 384 px wide, in whole pixels of the image
    assert {Image.open(file).size for file in files} == {(24 * 16, 16 * 16)}
    pixels = np.asarray(Image.open(files[0]), dtype=float)
    assert pixels.std() > 5
    assert (pixels != np.asarray(Image.open(files[1]))).any()


def test_a_closed_pipe_ends_quietly(checkpoint, images):
    command = [sys.executable, "-m", "vit.predict", str(checkpoint), *[str(images)] * 200]
    options = ["--format", "json", "--workers", "0", "--batch-size", "1"]
    process = subprocess.Popen(
        command + options, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert json.loads(process.stdout.readline())["image"].endswith("a b.png")
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k", "0"], "--top-k "),
        (["--batch-size", "-1"], "--batch-size "),
        (["--workers", "-1"], "--workers "),
        (["--out", "{folder}"], "--out {folder}: "),
        (["--out", "{folder}/a b.png"], "--out {folder}/a b.png: "),
        (["--out", "{folder}/none/x.csv"], "--out {folder}/none/x.csv: "),
        (["--attention", "{folder}/a b.png"], "--attention {folder}/a b.png: "),
    ],
)
def test_a_mistake_is_one_line(checkpoint, images, capsys, options, message):
    options = [option.format(folder=images) for option in options]
    assert predict(checkpoint, images, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vit.predict: {message.format(folder=images)}")
    assert (images / "a b.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_is_not_a_checkpoint(images, capsys):
    file = images / "a b.png"
    assert predict(file, images) == 2
    assert str(file) in capsys.readouterr().err
