"""python -m vit.predict: what it answers, in which order, and what it says of what it can't read."""

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
from helpers import ROOT
from PIL import Image

from vit.checkpoints.file import write_checkpoint
from vit.checkpoints.model import build_model, load
from vit.data.preprocessing import Preprocessing
from vit.errors import run_command
from vit.model.vision_transformer import VisionTransformer
from vit.predict import main, read_batches

SIZE = (16, 24)
PREPROCESSING = Preprocessing(SIZE, 3, (0.5,), (0.5,), None, "bilinear")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of three classes, one with an awkward name."""
    torch.manual_seed(0)
    config = {
        "name": "tiny",
        "image_size": list(SIZE),
        "patch_size": 8,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "init": "trunc_normal",
        "init_range": 0.3,
    }
    model = build_model(config, 3)
    torch.nn.init.normal_(model.head.weight)
    assert isinstance(model, VisionTransformer)
    path = tmp_path_factory.mktemp("checkpoint") / "best.safetensors"
    write_checkpoint(
        path,
        model.state_dict(),
        {
            "kind": "best",
            "config": {"model": config},
            "classes": ["cat", 'größer, "dog"', "鳥"],
            "preprocessing": PREPROCESSING.to_dict(),
            "precision": "fp32",
        },
    )
    return path


@pytest.fixture
def pictures(tmp_path):
    """Pictures of every mode and with awkward names, in a folder with a folder in it."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for name, mode in (
        ("a b.png", "RGB"),
        ("grey.png", "L"),
        ("print.jpg", "CMYK"),
        ("clear.png", "RGBA"),
        ("ünï 鳥.png", "P"),
        ('below/z, "q".png', "1"),
        ("below/deep.png", "I;16"),
        ("two\nlines.png", "RGB"),
    ):
        pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)
        (deep if mode == "I;16" else Image.fromarray(pixels).convert(mode)).save(folder / name)
    return folder


def expected(saved, path):
    model = load(saved)
    with torch.no_grad():
        return model(model.preprocessing(path)[None])[0].softmax(dim=0)


def in_order(folder):
    return [
        str(folder / name)
        for name in (
            "a b.png",
            "clear.png",
            "grey.png",
            "print.jpg",
            "two\nlines.png",
            "ünï 鳥.png",
            "below/deep.png",
            'below/z, "q".png',
        )
    ]


def answers(text):
    return [json.loads(line) for line in text.splitlines()]


def test_probabilities_are_the_models_in_the_order_given(saved, pictures, capsys):
    grey = str(pictures / "grey.png")
    assert (
        run_command(
            "vit.predict",
            lambda: main(
                [
                    str(saved),
                    grey,
                    str(pictures),
                    grey,
                    "--format",
                    "json",
                    "--top-k",
                    "9",
                    "--batch-size",
                    "3",
                ]
            ),
        )
        == 0
    )
    rows = answers(capsys.readouterr().out)
    assert [row["image"] for row in rows] == [grey, *in_order(pictures), grey]
    for row in rows:
        wanted = expected(saved, row["image"])
        assert len(row["predictions"]) == 3  # no more classes than there are
        assert [one["probability"] for one in row["predictions"]] == pytest.approx(
            wanted.sort(descending=True).values.tolist(), rel=1e-4
        )
        assert [one["class"] for one in row["predictions"]] == wanted.argsort(
            descending=True
        ).tolist()
        assert [one["label"] for one in row["predictions"]] == [
            load(saved).classes[one["class"]] for one in row["predictions"]
        ]


def test_workers_and_batches_change_no_answer(saved, pictures, capsys):
    told = []
    for more in (
        ["--workers", "0"],
        ["--workers", "2", "--batch-size", "2"],
        ["--workers", "1", "--batch-size", "1"],
    ):
        main([str(saved), str(pictures), str(pictures), "--format", "json", *more])
        told.append(answers(capsys.readouterr().out))
    assert [row["image"] for row in told[0]] == 2 * in_order(pictures)
    for other in told[1:]:
        assert [row["image"] for row in other] == [row["image"] for row in told[0]]
        assert [one["probability"] for row in other for one in row["predictions"]] == pytest.approx(
            [one["probability"] for row in told[0] for one in row["predictions"]], rel=1e-4
        )


def test_csv_and_table_hold_the_same(saved, pictures, tmp_path, capsys):
    main([str(saved), str(pictures), "--format", "json", "--top-k", "2"])
    wanted = [
        (row["image"], one["label"], one["probability"])
        for row in answers(capsys.readouterr().out)
        for one in row["predictions"]
    ]
    main(
        [
            str(saved),
            str(pictures),
            "--format",
            "csv",
            "--top-k",
            "2",
            "--out",
            str(tmp_path / "found.csv"),
        ]
    )
    assert "8 pictures" in capsys.readouterr().out
    rows = list(
        csv.DictReader(io.StringIO((tmp_path / "found.csv").read_bytes().decode(), newline=""))
    )
    assert [(row["image"], row["label"], float(row["probability"])) for row in rows] == [
        (image, label, pytest.approx(chance, rel=1e-4)) for image, label, chance in wanted
    ]
    assert [row["rank"] for row in rows] == ["1", "2"] * 8
    main([str(saved), str(pictures), "--top-k", "2"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["image", "label", "probability"]
    parsed = [re.fullmatch(r"(.*?) {2,}(\S.*?) {2,}([\d.]+)%", line).groups() for line in lines]
    assert [image for image, _, _ in parsed if image] == [
        path.replace("\n", "\\n") for path in in_order(pictures)
    ]
    assert [label for _, label, _ in parsed] == [label for _, label, _ in wanted]
    assert [float(chance) for _, _, chance in parsed] == pytest.approx(
        [100 * chance for *_, chance in wanted], abs=0.006
    )


def test_what_cannot_be_read_is_told_and_left_out(saved, pictures, tmp_path, capsys):
    (pictures / "cut.jpg").write_bytes((pictures / "print.jpg").read_bytes()[:300])
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    assert (
        run_command(
            "vit.predict",
            lambda: main(
                [
                    str(saved),
                    "missing.png",
                    str(pictures),
                    str(tmp_path / "empty"),
                    str(tmp_path / "no*.png"),
                    str(tmp_path / "pipe.png"),
                    "--format",
                    "json",
                ]
            ),
        )
        == 2
    )
    said = capsys.readouterr()
    assert [row["image"] for row in answers(said.out)] == in_order(pictures)
    lines = said.err.splitlines()
    for line, words in zip(
        lines,
        (
            "missing.png: no such file",
            "cut.jpg: not a readable picture",
            "empty: no pictures in this",
            "no*.png: no file matches",
            "pipe.png: not a file",
            "5 of 13 can't be read",
        ),
        strict=True,
    ):
        assert words in line


def test_patterns_are_sorted_and_reach_below(saved, pictures, capsys):
    main([str(saved), str(pictures / "**" / "*e*.png"), "--format", "json"])
    assert [row["image"] for row in answers(capsys.readouterr().out)] == sorted(
        str(path) for path in pictures.rglob("*e*.png")
    )


@pytest.mark.parametrize("dash", [["-"], []])
def test_paths_from_a_pipe(saved, pictures, dash, capsys, monkeypatch):
    wanted = [str(pictures / "a b.png"), str(pictures / "ünï 鳥.png"), str(pictures / "below")]
    for text, code in (("\n".join(["", *wanted]), 0), ("", 2)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert (
            run_command("vit.predict", lambda: main([str(saved), *dash, "--format", "json"]))
            == code
        )
        found = [row["image"] for row in answers(capsys.readouterr().out)]
        assert found == (wanted[:2] + in_order(pictures)[-2:] if text else [])


def test_a_name_that_is_no_unicode(saved, pictures, tmp_path, capfd):
    name = os.fsencode(pictures) + b"/caf\xe9.png"
    os.rename(pictures / "a b.png", name)
    for kind in ("json", "csv"):
        main(
            [
                str(saved),
                os.fsdecode(name),
                "--format",
                kind,
                "--out",
                str(tmp_path / kind),
                "--top-k",
                "1",
            ]
        )
    assert answers((tmp_path / "json").read_text())[0]["image"] == os.fsdecode(name)
    assert name in (tmp_path / "csv").read_bytes()
    main([str(saved), os.fsdecode(name)])
    assert "caf\\udce9.png" in capfd.readouterr().out


def test_overlays_of_attention(saved, pictures, tmp_path, capsys):
    main([str(saved), str(pictures), "--attention", str(tmp_path / "maps"), "--batch-size", "5"])
    drawn = sorted((tmp_path / "maps").iterdir())
    assert [path.name for path in drawn[:3]] == [
        "000001_a b.png",
        "000002_clear.png",
        "000003_grey.png",
    ]
    assert len(drawn) == 8
    assert {Image.open(path).size for path in drawn} == {
        (24 * 16, 16 * 16)
    }  # 384 px wide, whole pixels
    pixels = np.asarray(Image.open(drawn[0]), dtype=float)
    assert pixels.std() > 5
    assert (pixels != np.asarray(Image.open(drawn[1]))).any()


def test_a_closed_pipe_ends_quietly(saved, pictures):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vit.predict",
            str(saved),
            *[str(pictures)] * 200,
            "--format",
            "json",
            "--workers",
            "0",
            "--batch-size",
            "1",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert json.loads(process.stdout.readline())["image"].endswith("a b.png")
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--top-k", "0"], "--top-k must be 1 or more"),
        (["--batch-size", "-1"], "--batch-size must be 1"),
        (["--workers", "-1"], "--workers must be 0"),
        (["--out", "{folder}"], "give the name of a text file"),
        (["--out", "{folder}/a b.png"], "give the name of a text file"),
        (["--out", "{folder}/none/x.csv"], "can't write there"),
        (["--attention", "{folder}/a b.png"], "can't write there"),
    ],
)
def test_mistakes_are_one_line(saved, pictures, capsys, arguments, told):
    filled = [argument.format(folder=pictures) for argument in arguments]
    assert run_command("vit.predict", lambda: main([str(saved), str(pictures), *filled])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_checkpoint_that_is_none(tmp_path, pictures, capsys):
    assert run_command("vit.predict", lambda: main([str(pictures / "a b.png"), str(pictures)])) == 2
    assert "not a whole safetensors file" in capsys.readouterr().err


def test_thousands_of_paths_are_not_listed_first():
    """The first answers come before the last path is known."""
    asked = []

    def paths():
        for number in range(10_000):
            asked.append(number)
            yield f"/nowhere/{number}.png"

    batch = next(read_batches(paths(), PREPROCESSING, 8, 0))
    assert len(batch.unreadable) == 8
    assert len(asked) < 100
