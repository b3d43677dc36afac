"""python -m vit.embed: its features, what a kill costs, what it refuses, and the page."""

import base64
import errno
import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys
import termios
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from foreign_models import timm_model
from helpers import ROOT, SMALL_BLOCKS, make_images, run, start, wait_until
from limited_memory import memory_of
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file

import vit.features.embedder
import vit.features.journal
from vit.checkpoints.file import read_checkpoint, write_checkpoint
from vit.checkpoints.model import build_model, load
from vit.data.preprocessing import Preprocessing
from vit.embed import main
from vit.errors import run_command
from vit.features.files import open_features
from vit.weights.loading import build

SIZE = (16, 24)
CONFIG = {
    "name": "tiny",
    "image_size": list(SIZE),
    **SMALL_BLOCKS,
}
# In the order of their paths
PATHS = [
    "pets/a.png",
    *(f"pets/{split}/{n}.jpg" for split in ("test/cat", "test/dog") for n in "01"),
]
PATHS += [f"pets/{split}/{n}.jpg" for split in ("train/cat", "train/dog") for n in "012"]
LABELS = [path.split("/")[2] if path.count("/") > 1 else "" for path in PATHS]


def write_model(path, seed=0, **changes):
    torch.manual_seed(seed)
    config = CONFIG | changes
    header = {
        "kind": "best",
        "config": {"model": config},
        "classes": ["cat", "dog"],
        "preprocessing": Preprocessing(SIZE, 3, (0.5,), (0.5,), None, "bilinear").to_dict(),
        "precision": "fp32",
    }
    write_checkpoint(Path(path), build_model(config, 2).state_dict(), header)
    return load(path)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """best.safetensors, and the images PATHS, in the current folder."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "pets", {"test": 2, "train": 3})
    Image.effect_noise((30, 20), 80).save("pets/a.png")
    return write_model("best.safetensors")


def embed(*arguments) -> int:
    """Run the command in this process; return its exit code."""
    return run_command("vit.embed", lambda: main([str(argument) for argument in arguments]))


def embed_pets(out, *options) -> int:
    return embed("best.safetensors", "pets", "--out", out, "--batch-size", 4, *options)


def content(path):
    """(features, images, about) of a file."""
    file = open_features(path)
    images = [tuple(image) for image in file.images(range(file.rows))]
    return np.concatenate(list(file.blocks())), images, file.about


def expected_features(model, paths=PATHS):
    images = torch.stack([model.preprocessing(path) for path in paths])
    with torch.no_grad():
        return model.trace(images).pooled.numpy()


@pytest.mark.parametrize("name", ["f.npz", "new/f.parquet"])
@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_the_models_in_the_order_given(model, name, workers, capsys):
    assert embed_pets(name, "--workers", workers) == 0
    assert "11 images, 32 features each" in capsys.readouterr().out
    features, images, about = content(name)
    assert images == list(zip(PATHS, LABELS, strict=True))
    np.testing.assert_allclose(features, expected_features(model), atol=1e-5)
    assert about["precision"] == "fp32"
    assert about["rows"] == 11
    assert not Path(f"{name}.partial").exists()


def test_numpy_and_pyarrow_read_the_files(model):
    for name in ("f.npz", "f.parquet"):
        embed_pets(name)
    expected = expected_features(model)
    with np.load("f.npz") as file:
        np.testing.assert_allclose(file["features"], expected, atol=1e-5)
        assert file["paths"].tolist() == PATHS
        assert file["labels"].tolist() == LABELS
        assert json.loads(file["about"].item())["model"] == "best.safetensors"
    table = parquet.read_table("f.parquet")
    assert table.column_names == ["path", "label", "features"]
    assert table["path"].to_pylist() == PATHS
    assert table["label"].to_pylist() == [label or None for label in LABELS]
    np.testing.assert_allclose(np.array(table["features"].to_pylist()), expected, atol=1e-5)

    mapped = open_features("f.npz").features
    assert isinstance(mapped, np.memmap)
    assert mapped.flags.aligned
    np.testing.assert_allclose(mapped[3], expected[3], atol=1e-5)


def test_images_without_any_label_get_no_column_of_labels(model):
    for name in ("f.npz", "f.parquet"):
        assert embed("best.safetensors", "pets/test/cat", "pets/a.png", "--out", name) == 0
        expected = [("pets/test/cat/0.jpg", ""), ("pets/test/cat/1.jpg", ""), ("pets/a.png", "")]
        assert content(name)[1] == expected
    assert sorted(np.load("f.npz").files) == ["about", "features", "paths"]
    assert parquet.read_schema("f.parquet").names == ["path", "features"]


def test_blocks_smaller_than_the_file(model, monkeypatch):
    embed_pets("whole.npz")
    monkeypatch.setattr(vit.features.files, "BLOCK_BYTES", 4 * 32 * 3)
    expected = content("whole.npz")
    assert len(list(open_features("whole.npz").blocks())) == 4
    for name in ("f.npz", "f.parquet"):
        embed_pets(name)
        features, images, _ = content(name)
        np.testing.assert_array_equal(features, expected[0])
        assert images == expected[1]
    assert parquet.ParquetFile("f.parquet").num_row_groups == 4
    assert Path("f.npz").read_bytes() == Path("whole.npz").read_bytes()


def test_names_that_are_not_unicode(model):
    name = os.fsencode("pets") + b"/caf\xe9.png"
    os.rename("pets/a.png", name)
    for out in ("f.npz", "f.parquet"):
        options = ("--out", out, "--similar", f"{out}.html")
        assert embed("best.safetensors", os.fsdecode(name), "pets/test", *options) == 0
        assert r"pets/caf\xe9.png" in Path(f"{out}.html").read_text(encoding="utf-8")
    assert os.fsencode(content("f.npz")[1][0][0]) == name
    assert content("f.parquet")[1][0][0] == r"pets/caf\xe9.png"


def test_tables_and_the_column_of_their_labels(model, capsys):
    Path("x.csv").write_text("path,kind\npets/a.png,bird\npets/test/cat/0.jpg,\n")
    assert embed("best.safetensors", "x.csv", "--label-column", "kind", "--out", "f.npz") == 0
    assert content("f.npz")[1] == [("pets/a.png", "bird"), ("pets/test/cat/0.jpg", "")]
    assert embed("best.safetensors", "x.csv", "--out", "g.npz") == 2
    assert "x.csv: no column label" in capsys.readouterr().err


@pytest.mark.parametrize("head", [5, 0])
def test_foreign_weights_with_a_head_and_without(tmp_path, monkeypatch, head, capsys):
    monkeypatch.chdir(tmp_path)
    theirs = timm_model(num_classes=head)
    timm.models.save_for_hf(theirs, "timm", safe_serialization=True)
    save_file(theirs.state_dict(), "bare.safetensors")
    Image.effect_noise((64, 64), 80).save("a.png")
    assert embed("timm", "a.png", "--precision", "fp32", "--out", "f.npz") == 0
    assert capsys.readouterr().err == ""
    features, _, about = content("f.npz")
    assert about["width"] == 192
    assert np.abs(features - expected_timm(theirs)).max() < 1e-5
    assert embed("bare.safetensors", "a.png", "--out", "g.npz") == 0
    assert "holds no preprocessing" in capsys.readouterr().err


def expected_timm(theirs):
    """Its features of a.png, prepared as its file says."""
    pixels = build("timm", num_classes=1).preprocessing("a.png")
    with torch.no_grad():
        return theirs.forward_head(theirs.forward_features(pixels[None]), pre_logits=True).numpy()


def test_precision_is_as_asked_for_and_noted(model, capsys):
    embed_pets("f.npz", "--precision", "bf16")
    features, _, about = content("f.npz")
    assert about["precision"] == "bf16"
    assert features.dtype == np.float32
    difference = np.abs(features - expected_features(model)).max()
    assert 1e-4 < difference < 0.2


def test_features_that_are_not_finite_are_refused(model, capsys):
    tensors, header = read_checkpoint("best.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["encoder.norm.bias"].fill_(torch.inf)
    write_checkpoint(Path("best.safetensors"), tensors, header)
    assert embed_pets("f.npz") == 2
    assert "features are not finite" in capsys.readouterr().err
    assert not Path("f.npz").exists()


def test_kernels_of_attention_are_settled_before_any_feature(model, monkeypatch):
    settled = []
    monkeypatch.setattr(
        vit.features.embedder,
        "exclude_faulty_attention",
        lambda device, model: settled.append(model.hidden_size),
    )
    assert embed_pets("f.npz") == 0
    assert settled == [model.hidden_size]


def test_where_memory_ends_batches_are_halved(model, monkeypatch, capsys):
    embed_pets("expected.npz")
    load_embedder, limits = vit.features.embedder.load_embedder, []

    def with_little_memory(*arguments):
        embedder = load_embedder(*arguments)
        limits.append(memory_of(embedder.model.encoder, 3))
        limits[0].__enter__()
        return embedder

    monkeypatch.setattr(vit.features.embedder, "load_embedder", with_little_memory)
    assert embed_pets("f.npz") == 0
    assert "memory ended with 4 images at once" in capsys.readouterr().err
    np.testing.assert_allclose(content("f.npz")[0], content("expected.npz")[0], atol=1e-5)


def test_unreadable_images_are_reported_and_left_out(model, capsys):
    Path("pets/test/cat/0b.jpg").write_bytes(Path("pets/test/cat/0.jpg").read_bytes()[:200])
    names = ("missing.png", "pets", "no*.png")
    assert embed("best.safetensors", *names, "--out", "f.npz", "--batch-size", 3) == 2
    *lines, last = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "missing.png",
        "pets/test/cat/0b.jpg",
        "no*.png",
    ]
    assert "3 of 14 could not be read" in last
    features, images, about = content("f.npz")
    assert images == list(zip(PATHS, LABELS, strict=True))
    np.testing.assert_allclose(features, expected_features(model), atol=1e-5)
    assert about["left_out"] == 3
    # Also where there is nothing left to do
    assert embed("best.safetensors", *names, "--out", "f.npz", "--batch-size", 3) == 2


def test_nothing_that_can_be_read(model, monkeypatch, capsys):
    assert embed("best.safetensors", "missing.png", "--out", "f.npz") == 2
    assert "no image could be read" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert embed("best.safetensors", "-", "--out", "f.npz") == 2
    assert "no images were named" in capsys.readouterr().err
    assert list(Path().glob("f.npz*")) == []


@pytest.fixture
def commits(monkeypatch):
    """Every batch is committed, not one batch a second."""
    monkeypatch.setattr(vit.features.journal, "COMMIT_SECONDS", 0.0)


class Ended(BaseException):
    """The end of a command, anywhere."""


def end_after(monkeypatch, batches):
    """The command ends in the middle of appending the batch after so many."""
    append, count = vit.features.journal.Journal.append, [0]

    def end(journal, features, images, sources):
        if count[0] == batches:
            journal.features.write(b"half a batch")
            journal.features.flush()
            raise Ended
        count[0] += 1
        append(journal, features, images, sources)

    monkeypatch.setattr(vit.features.journal.Journal, "append", end)


@pytest.mark.usefixtures("commits")
@pytest.mark.parametrize("name", ["f.npz", "f.parquet"])
@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_command_that_ended_goes_on_to_the_same_bytes(model, name, batches, capsys):
    embed_pets(f"whole_{name}")
    with pytest.MonkeyPatch.context() as patch:
        end_after(patch, batches)
        with pytest.raises(Ended):
            embed_pets(name)
    assert not Path(name).exists()
    capsys.readouterr()
    assert embed_pets(name) == 0
    printed = capsys.readouterr().out
    assert (f"going on after {4 * batches} images" in printed) == (batches > 0)
    assert Path(name).read_bytes() == Path(f"whole_{name}").read_bytes()
    assert not Path(f"{name}.partial").exists()


@pytest.mark.usefixtures("commits")
def test_a_command_that_ended_while_the_file_was_written(model, monkeypatch):
    embed_pets("whole.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit.features.journal.Journal, "remove", lambda journal: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed_pets("f.npz")
    assert embed_pets("f.npz") == 0
    assert Path("f.npz").read_bytes() == Path("whole.npz").read_bytes()
    # Or while the folder was removed, the state first
    Path("f.npz.partial").mkdir()
    assert embed_pets("f.npz") == 0


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again(model, tmp_path):
    """A real process, which gets its paths one by one, is killed when it has committed some."""
    paths = [str(tmp_path / path) for path in PATHS * 40]
    Path("list.txt").write_text("\n".join(paths))
    options = ("--batch-size", "3", "--workers", "0", "--out")
    arguments = (str(tmp_path / "best.safetensors"), *options)
    with open("list.txt") as whole:
        done = run("vit.embed", *arguments, str(tmp_path / "whole.npz"), stdin=whole, cwd=ROOT)
    assert done.returncode == 0, done.stderr

    state = Path("f.npz.partial/state.json")
    rows = 0
    for _ in range(2):
        reading, writing = os.pipe()
        process = start("vit.embed", *arguments, str(tmp_path / "f.npz"), stdin=reading, cwd=ROOT)
        os.close(reading)
        lines = iter(f"{path}\n".encode() for path in paths[:-1])

        def has_gone_on(lines=lines, writing=writing, before=rows):
            # Not before the last one was taken: the command takes seconds to start
            unread = fcntl.ioctl(writing, termios.FIONREAD, bytes(4))
            if unread == bytes(4):
                os.write(writing, next(lines, b""))
            return state.exists() and json.loads(state.read_text())["rows"] > before

        wait_until(has_gone_on, process)
        process.kill()
        process.communicate()
        os.close(writing)
        rows = json.loads(state.read_text())["rows"]
    assert not Path("f.npz").exists()
    with open("list.txt") as whole:
        done = run("vit.embed", *arguments, str(tmp_path / "f.npz"), stdin=whole, cwd=ROOT)
    assert f"going on after {rows} images" in done.stdout, done.stderr
    assert Path("f.npz").read_bytes() == Path("whole.npz").read_bytes()


def test_a_finished_file_is_left_as_it_is(model, capsys):
    embed_pets("f.npz")
    before = Path("f.npz").stat().st_mtime_ns
    assert embed_pets("f.npz") == 0
    assert "f.npz: complete already" in capsys.readouterr().out
    assert Path("f.npz").stat().st_mtime_ns == before
    assert embed_pets("f.npz", "--overwrite") == 0
    assert Path("f.npz").stat().st_mtime_ns > before


def another_checkpoint():
    write_model("best.safetensors", seed=1)


def another_architecture():
    write_model("best.safetensors", activation="relu")


def another_image():
    shutil.copy("pets/test/dog/0.jpg", "pets/test/cat/0.jpg")


def one_image_less():
    os.remove("pets/a.png")


CHANGES = [
    (another_checkpoint, [], "features of another checkpoint"),
    (another_architecture, [], "features of another checkpoint"),
    (another_image, [], "features of other images"),
    (one_image_less, [], "features of other images"),
    (None, ["--precision", "bf16"], "features with precision fp32, not bf16"),
    (None, ["--batch-size", "3"], "features with batch size 4, not 3"),
]


@pytest.mark.usefixtures("commits")
@pytest.mark.parametrize("begun", [True, False], ids=["begun", "finished"])
@pytest.mark.parametrize(("change", "options", "message"), CHANGES)
def test_what_was_made_of_something_else_is_refused(model, begun, change, options, message, capsys):
    with pytest.MonkeyPatch.context() as patch:
        if begun:
            end_after(patch, 2)
            with pytest.raises(Ended):
                embed_pets("f.npz")
        else:
            embed_pets("f.npz")
    if change is not None:
        change()
    kept = Path("f.npz.partial/state.json" if begun else "f.npz")
    before = kept.read_bytes()
    capsys.readouterr()
    assert embed_pets("f.npz", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    name = "f.npz.partial" if begun else "f.npz"
    assert line.startswith(f"vit.embed: {name}: holds {message}; start anew with --overwrite")
    assert kept.read_bytes() == before

    assert embed_pets("f.npz", *options, "--overwrite") == 0
    embed_pets("whole.npz", *options)
    assert Path("f.npz").read_bytes() == Path("whole.npz").read_bytes()


@pytest.mark.usefixtures("commits")
def test_images_that_come_after_those_that_are_done_may_change(model):
    with pytest.MonkeyPatch.context() as patch:
        end_after(patch, 1)
        with pytest.raises(Ended):
            embed_pets("f.npz")
    os.remove("pets/train/dog/2.jpg")
    assert embed_pets("f.npz") == 0
    embed_pets("whole.npz")
    assert Path("f.npz").read_bytes() == Path("whole.npz").read_bytes()


def test_the_head_makes_no_difference(model):
    embed_pets("f.npz")
    tensors, header = read_checkpoint("best.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["head.weight"] += 1
    write_checkpoint(Path("best.safetensors"), tensors, header)
    assert embed_pets("f.npz") == 0


@pytest.mark.usefixtures("commits")
def test_two_commands_cannot_write_one_file(model, capsys):
    settings = {"width": 32}
    journal = vit.features.journal.Journal(Path("f.npz.partial"), settings)
    assert embed_pets("f.npz") == 2
    assert "another command is writing there" in capsys.readouterr().err
    journal.close()
    assert embed_pets("f.npz") == 0


@pytest.mark.usefixtures("commits")
@pytest.mark.parametrize("place", ["append", "commit", "write_features"])
def test_a_full_disk_is_one_line_and_what_is_done_stays(model, place, monkeypatch, capsys):
    embed_pets("whole.npz")
    owner = vit.features.files if place == "write_features" else vit.features.journal.Journal
    work, count = getattr(owner, place), [0]

    def fill(*arguments):
        count[0] += 1
        if count[0] == 2 or owner is vit.features.files:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return work(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, place, fill)
        capsys.readouterr()
        assert embed_pets("f.npz") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vit.embed: --out f.npz: can't write there (No space left on device)")
    assert embed_pets("f.npz") == 0
    assert Path("f.npz").read_bytes() == Path("whole.npz").read_bytes()


@pytest.mark.usefixtures("commits")
@pytest.mark.parametrize("damage", ["state.json", "features.f32"])
def test_a_damaged_folder_is_one_line(model, damage, capsys):
    with pytest.MonkeyPatch.context() as patch:
        end_after(patch, 2)
        with pytest.raises(Ended):
            embed_pets("f.npz")
    os.truncate(f"f.npz.partial/{damage}", 20)
    assert embed_pets("f.npz") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vit.embed: f.npz.partial/{damage}: ")
    assert "--overwrite" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("pets --out f.npy", "--out f.npy: give the name of a file that ends in .npz or .parquet"),
        ("pets --out pets", "--out pets: "),
        ("pets --out best.safetensors", "--out best.safetensors: "),
        ("pets --out pets/a.png/f.npz", "--out pets/a.png/f.npz: "),
        ("pets --out /proc/none/f.npz", "--out /proc/none/f.npz: "),
        ("pets --out pets/f.parquet", "--out pets/f.parquet: lies among the images"),
        ("pets --out f.npz --batch-size 0", "--batch-size "),
        ("pets --out f.npz --workers -1", "--workers "),
        ("pets --out f.npz --label-column kind", "--label-column does nothing"),
        ("pets --out f.npz --neighbors 3", "--neighbors does nothing without --similar"),
        ("pets --out f.npz --queries pets/a.png", "--queries does nothing without --similar"),
        ("pets --out f.npz --similar x.html --neighbors 0", "--neighbors must be 1"),
        ("pets --out f.npz --similar x.html --neighbors 400", "--similar: the page would hold 4,8"),
        (
            "pets --out f.npz --similar x.html --queries pets --neighbors 4000",
            "--similar: the page would hold 4,0",
        ),
        ("pets --out f.npz --similar x.npz", "--similar x.npz: "),
        ("pets --out f.npz --similar /proc/none/x.html", "--similar /proc/none/x.html: "),
        (
            "pets --out f.npz --similar x.html --num-queries 2 --queries pets/a.png",
            "--num-queries does nothing beside --queries",
        ),
        ("none.csv --out f.npz", "{folder}/none.csv: "),
        ("none.parquet --out f.npz", "{folder}/none.parquet: "),
        ("pets --out other.npz", "--out other.npz: not a file of features"),
        ("pets --out other.parquet", "--out other.parquet: not a file of features"),
    ],
)
def test_a_mistake_is_one_line(model, tmp_path, options, message, capsys):
    np.savez_compressed("other.npz", features=np.zeros(3), about=np.zeros(3))
    Path("other.parquet").write_text("no parquet")
    other = Path("other.npz").read_bytes()
    assert embed("best.safetensors", *options.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vit.embed: {message.format(folder=tmp_path)}")
    assert Path("other.npz").read_bytes() == other
    assert list(Path().glob("f.npz*")) == []


def test_a_checkpoint_that_is_not_there(model, capsys):
    assert embed("none.safetensors", "pets", "--out", "f.npz") == 2
    assert "none.safetensors: " in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(model, tmp_path):
    peaks = [peak_memory(count, tmp_path) for count in (600, 6_000)]
    assert open_features("f6000.npz").rows == 6_000
    # The pixels alone would be 6 MB more, and the features of 32 numbers another
    assert peaks[1] - peaks[0] < 4 * 1024, peaks


def peak_memory(count, folder):
    """KiB that the command had at most with so many images, the same again and again."""
    Path("list.txt").write_text("pets/a.png\n" * count)
    # Not getrusage(), whose peak is that of the process which started this one, if it was larger
    script = (
        "import re, sys; from vit.embed import main; main(sys.argv[1:]); "
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    options = ["--out", f"f{count}.npz", "--workers", "0"]
    with open("list.txt") as names:
        done = subprocess.run(
            [sys.executable, "-c", script, "best.safetensors", *options],
            cwd=folder,
            stdin=names,
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def neighbors_by_hand(features, row):
    """The other rows, the most similar first, and their similarities."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    scores = unit @ unit[row]
    order = [other for other in np.argsort(-scores, kind="stable") if other != row]
    return order, scores[order]


def shown_on(page):
    """For each section of the page the paths, the first of which is the query's; the scores."""
    text = Path(page).read_text(encoding="utf-8")
    sections = text.split("<section>")[1:]
    paths = [re.findall(r'<figure[^>]* title="([^"]*)"', section) for section in sections]
    scores = [re.findall(r"<figcaption>(-?[\d.]+)", section) for section in sections]
    return paths, [[float(score) for score in row] for row in scores]


@pytest.mark.parametrize("name", ["f.npz", "f.parquet"])
@pytest.mark.parametrize("rows", [2, 100])
def test_the_page_shows_queries_beside_their_neighbors(model, name, rows, monkeypatch, capsys):
    # Also where the rows are read in blocks
    monkeypatch.setattr(vit.features.files, "BLOCK_BYTES", 4 * 32 * rows)
    assert embed_pets(name, "--similar", "page.html", "--num-queries", 3, "--neighbors", 4) == 0
    assert "page.html: 3 queries" in capsys.readouterr().out
    paths, scores = shown_on("page.html")
    features = content(name)[0]
    for section, its_scores, row in zip(paths, scores, (1, 5, 9), strict=True):
        order, similarities = neighbors_by_hand(features, row)
        assert section == [PATHS[row], *(PATHS[other] for other in order[:4])]
        np.testing.assert_allclose(its_scores, similarities[:4], atol=6e-4)


def test_the_page_says_which_neighbors_are_of_the_querys_class(model):
    embed_pets("f.npz", "--similar", "page.html", "--num-queries", 11, "--neighbors", 10)
    text = Path("page.html").read_text(encoding="utf-8")
    # Of a.png no class is known: ten queries with nine neighbors of known class, four of them alike
    assert text.count('same">✓ ') - 1 == 10 * 4  # and the legend
    assert text.count('other">≠ ') - 1 == 10 * 5
    assert "44.4\u00a0% of the neighbors" in text


def test_the_page_of_other_images(model, capsys):
    embed_pets("f.npz")
    Image.effect_noise((500, 300), 80).save("large.png")
    names = ("pets/a.png", "large.png")
    assert embed_pets("f.npz", "--similar", "page.html", "--queries", *names) == 0
    paths, scores = shown_on("page.html")
    assert [section[0] for section in paths] == list(names)
    # Not itself
    assert "pets/a.png" not in paths[0][1:]
    assert len(paths[0]) == 9
    query = torch.from_numpy(expected_features(model, ["large.png"]))
    expected = torch.cosine_similarity(query, torch.from_numpy(expected_features(model)))
    np.testing.assert_allclose(scores[1], expected.sort(descending=True).values[:8], atol=6e-4)
    assert embed_pets("f.npz", "--similar", "page.html", "--queries", "none.png") == 2
    assert "--queries: none.png: " in capsys.readouterr().err


def test_the_page_stands_alone_and_survives_odd_names(model, tmp_path):
    os.rename("pets/test/cat", "pets/test/<b>&cat")
    Image.effect_noise((500, 300), 80).save("pets/large.png")
    embed_pets("f.npz", "--similar", "page.html")
    os.remove("pets/a.png")
    options = ("--overwrite", "--similar", "page.html", "--num-queries", 12)
    assert embed_pets("f.npz", *options) == 0
    text = Path("page.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;cat" in text
    assert "<b>" not in text
    without_images = re.sub(r'"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+"', '""', text)
    references = r"https?:|//[a-z]|\bhref\s*=|<script|@import|url\(|src=\"[^\"]"
    assert not re.search(references, without_images)

    copies = re.findall(r"data:image/(\w+);base64,([A-Za-z0-9+/=]+)", text)
    sizes = {kind: Image.open(io.BytesIO(base64.b64decode(data))).size for kind, data in copies}
    assert sizes == {"png": (40, 30), "jpeg": (160, 96)}


def test_the_page_says_where_an_image_is_gone(model):
    embed_pets("f.npz")
    with pytest.MonkeyPatch.context() as patch:
        # Between the features and the page
        patch.setattr(vit.report.similar, "small_copy", lambda path: None)
        embed_pets("f.npz", "--similar", "page.html", "--num-queries", 2)
    text = Path("page.html").read_text(encoding="utf-8")
    assert text.count("can’t be read any more") == 2 * 9


def test_members_are_stored_for_a_million_rows(model):
    """Sizes of 64 bits from the start, since the size of a member is known at its end alone."""
    embed_pets("f.npz")
    with zipfile.ZipFile("f.npz") as archive:
        kinds = {info.compress_type for info in archive.infolist()}
        assert archive.testzip() is None
    assert kinds == {zipfile.ZIP_STORED}
