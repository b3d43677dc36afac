"""python -m vit.prune: the heads it removes, what it measures and writes, mistakes."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from hydra import compose, initialize_config_dir
from judged_models import lose_workers, write_best, write_classes
from limited_memory import memory_of

import vit
import vit.prune
from vit.checkpoints.file import read_checkpoint, write_checkpoint
from vit.checkpoints.model import build_model
from vit.config.config import from_composed, register, to_dict
from vit.config.data import data_arguments
from vit.data.datasets import load_data
from vit.data.loader import evaluation_batches
from vit.data.preprocessing import Preprocessing
from vit.errors import run_command
from vit.evaluation.restore import restore
from vit.model.cost import count_macs
from vit.model.head_pruning import importance, least_important, removed_heads
from vit.prune import choose_heads, compare_speed, format_scores, main

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only wait for a second thread, above all where others use the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(vit.prune, "SPEED_ROUNDS", 2)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A checkpoint of a small model that has learned digits for some seconds."""
    register()
    overrides = ["model.num_layers=2", "model.hidden_size=64", "model.patch_size=8"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = from_composed(compose("train", ["experiment=digits", *overrides]))
    arguments = data_arguments(config.data, config.model.num_channels)
    data = load_data(**arguments, image_size=(16, 16), device=CPU)
    preprocessing = Preprocessing((16, 16), 1, (0.305,), (0.376,), None, "bilinear")
    torch.manual_seed(0)
    plain_config = to_dict(config)
    model = build_model(plain_config["model"], 10)
    learn(model, data.train, preprocessing, epochs=6)
    path = tmp_path_factory.mktemp("digits") / "best.safetensors"
    header = {
        "kind": "best",
        "config": plain_config,
        "classes": data.classes,
        "preprocessing": preprocessing.to_dict(),
        "precision": "fp32",
        "progress": {"step": 54},
    }
    write_checkpoint(path, model.state_dict(), header)
    return path


def learn(model, images, preprocessing, epochs):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for inputs, labels in evaluation_batches(images, 128, preprocessing, 0, CPU):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    model.eval()


def prune(*arguments) -> int:
    return run_command("vit.prune", lambda: main([str(argument) for argument in arguments]))


def num_heads(heads: dict[int, list[int]]) -> int:
    return sum(map(len, heads.values()))


@pytest.fixture
def pruned_file(digits, tmp_path, capsys) -> tuple[Path, str]:
    """A checkpoint with three of eight heads removed, and what the command printed."""
    path = tmp_path / "new" / "pruned.safetensors"
    assert prune(digits, "--fraction", "0.375", "--out", path) == 0
    return path, capsys.readouterr().out


def test_the_least_important_heads_on_train_are_removed(digits, pruned_file):
    path, output = pruned_file
    model, pruned = vit.load(digits), vit.load(path)
    removed = removed_heads(pruned)
    assert num_heads(removed) == 3
    train = restore(path, {}, CPU).data.train
    batches = evaluation_batches(train, 64, model.preprocessing, 0, CPU)
    assert least_important(importance(model, batches), 0.375) == removed
    assert "3 of 8" in output

    # Each head takes three matrices of 64 × 16 with their biases, and one of 16 × 64
    assert pruned.num_parameters() == model.num_parameters() - 3 * (4 * 64 * 16 + 3 * 16)
    assert count_macs(pruned) < count_macs(model)
    query = pruned.state_dict()["encoder.blocks.0.attention.query.weight"]
    assert query.shape == (16 * (4 - len(removed.get(0, []))), 64)


def test_the_printed_numbers_are_those_of_the_models(digits, pruned_file):
    path, output = pruned_file
    model, pruned = vit.load(digits), vit.load(path)
    restored = restore(path, {}, CPU)
    for name, measured in (("before", model), ("after", pruned)):
        metrics = restored.measure(measured, "val", 0)
        assert metrics["n"] == 287
        assert re.search(
            rf"{name} +top-1 {metrics['top1']:.2%} \(95 % .* loss {metrics['loss']:.4f} "
            r"\(digits, held out for validation, 287 images\)",
            output,
        )
    assert f"{pruned.num_parameters():,} parameters" in output
    assert "times as fast" in output


def test_the_header_changes_only_where_heads_are_named(digits, pruned_file):
    path, _ = pruned_file
    old = read_checkpoint(digits)[1]
    new = read_checkpoint(path)[1]
    removed = removed_heads(vit.load(path))
    expected = {str(layer): heads for layer, heads in removed.items()}
    assert new["config"]["model"].pop("pruned_heads") == expected
    note = new.pop("pruning")
    assert note["from"] == str(digits)
    assert note["top1_before"] > note["top1_after"] > 0
    del old["config"]["model"]["pruned_heads"]
    assert new == old


def test_fine_tune_and_prune_again(pruned_file, tmp_path, capsys):
    path, _ = pruned_file
    restored = restore(path, {}, CPU)
    removed = removed_heads(restored.model)
    before = restored.measure(restored.model, "val", 0)["loss"]
    learn(restored.model, restored.data.train, restored.model.preprocessing, epochs=2)
    assert restored.measure(restored.model, "val", 0)["loss"] < before
    tuned = tmp_path / "tuned.safetensors"
    write_checkpoint(tuned, restored.model.state_dict(), read_checkpoint(path)[1])

    # Now on a few images and another split
    second = tmp_path / "second.safetensors"
    options = ("--fraction", "0.4", "--limit", 40, "--split", "test")
    assert prune(tuned, "--out", second, *options) == 0
    output = capsys.readouterr().out
    assert "used as test, 40 images" in output
    assert "2 of 5" in output
    assert "fewer than asked" not in output
    twice = removed_heads(vit.load(second))
    assert num_heads(twice) == 5
    assert all(set(heads) <= set(twice[layer]) for layer, heads in removed.items())


def test_one_head_stays_in_every_layer(digits, tmp_path, capsys):
    out = tmp_path / "pruned.safetensors"
    assert prune(digits, "--fraction", "0.9", "--limit", 20, "--out", out) == 0
    assert "6 of 8 (fewer than asked, as one stays in every layer)" in capsys.readouterr().out
    assert num_heads(removed_heads(vit.load(out))) == 6


def test_without_a_validation_split_accuracy_is_measured_on_test(digits, tmp_path, capsys):
    tensors, header = read_checkpoint(digits)
    header["config"]["data"]["val_fraction"] = 0.0
    no_val, out = tmp_path / "no_val.safetensors", tmp_path / "pruned.safetensors"
    write_checkpoint(no_val, tensors, header)
    arguments = (no_val, "--fraction", "0.3", "--limit", 20, "--out", out)
    assert prune(*arguments, "--split", "val") == 2
    assert "split=val" in capsys.readouterr().err
    assert prune(*arguments) == 0
    assert "used as test, 20 images" in capsys.readouterr().out


def test_scores_are_a_line_per_layer():
    scores = torch.tensor([[0.5, torch.nan], [0.25, 1]])
    assert format_scores(scores, {1: [0]}).splitlines() == [
        "           head 0   head 1",
        "layer 0     0.500      -",
        "layer 1    [0.250]   1.000",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fraction", "0"], "--fraction "),
        (["--fraction", "1"], "--fraction "),
        (["--fraction", "nan"], "--fraction "),
        (["--fraction", "0.01", "--limit", "20"], "--fraction 0.01 removes none of the 8 heads"),
        (["--fraction", "0.3", "--limit", "0"], "--limit "),
        (["--fraction", "0.3", "--workers", "-1"], "--workers "),
        (["--fraction", "0.3", "--out", "."], "--out .: "),
        (
            ["--fraction", "0.3", "--limit", "20", "--out", "/proc/nowhere/x"],
            "--out /proc/nowhere/x: ",
        ),
    ],
)
def test_a_mistake_is_one_line(digits, tmp_path, capsys, options, message):
    out = tmp_path / "out.safetensors"
    assert prune(digits, "--out", out, *options) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"vit.prune: {message}")
    assert errors.count("\n") == 1
    assert not out.exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(digits, capsys):
    # It is there, so that making it does not fail
    out = "/proc/pruned.safetensors"
    assert prune(digits, "--fraction", "0.3", "--limit", 20, "--out", out) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"vit.prune: --out {out}: can't write there")
    assert printed.out == ""


def test_a_lost_worker_ends_in_one_line(tmp_path, monkeypatch, capsys):
    root = write_classes(tmp_path / "pets", ["cat", "dog"], count=20)
    best = tmp_path / "best.safetensors"
    write_best(best, ["cat", "dog"], "data=folder", f"data.root={root}")
    lose_workers(monkeypatch)
    out = tmp_path / "out.safetensors"
    assert prune(best, "--fraction", "0.5", "--workers", 1, "--out", out) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("vit.prune: --workers: a process that decodes images died")
    assert errors.count("\n") == 1


def test_the_checkpoint_itself_is_not_overwritten(digits, capsys):
    before = digits.read_bytes()
    assert prune(digits, "--fraction", "0.3", "--out", digits) == 2
    assert f"--out {digits}: " in capsys.readouterr().err
    assert digits.read_bytes() == before


def test_a_missing_checkpoint(tmp_path, capsys):
    missing = tmp_path / "nowhere"
    assert prune(missing, "--fraction", "0.3", "--out", tmp_path / "x") == 2
    assert f"{missing}: " in capsys.readouterr().err


def test_heads_are_scored_the_same_where_memory_ends(digits, capsys):
    restored = restore(digits, {"data.limit": 60}, CPU)
    heads = choose_heads(restored, 0.375, workers=0)
    # The trace of a scoring pass has no hook: its classifier does
    with memory_of(restored.model.head, 9) as sizes:
        assert choose_heads(restored, 0.375, workers=0) == heads
    assert sizes[:3] == [32, 16, 8]
    assert sum(sizes[2:]) == 60
    output = capsys.readouterr().out
    assert "memory ended with 16 images at once: from here on 8" in output


def test_speed_is_measured_on_as_many_images_as_fit(digits, capsys):
    restored = restore(digits, {"data.limit": 60}, CPU)
    pruned = copy.deepcopy(restored.model)
    with memory_of(restored.model, 20):
        compare_speed(restored, pruned, restored.data.test, workers=0)
    assert "(batches of 15, " in capsys.readouterr().out
