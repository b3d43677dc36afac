"""python -m vit.compare: configurations, metrics and a paired test of two runs."""

import contextlib
import shutil

import pytest
import torch
from judged_models import lose_workers, write_best, write_classes
from limited_memory import memory_of
from scipy.stats import binomtest, chi2

import vit.evaluation.restore
from vit.checkpoints.file import read_checkpoint, write_checkpoint
from vit.compare import compare, compare_predictions, find_differences, main, mcnemar, predict_split
from vit.errors import ConfigError, run_command


def test_mcnemars_test_is_the_exact_binomial():
    first = torch.tensor([True] * 60 + [False] * 40)
    second = torch.tensor([True] * 50 + [False] * 10 + [True] * 25 + [False] * 15)
    only_first, only_second, p = mcnemar(first, second)
    assert (only_first, only_second) == (10, 25)
    assert p == pytest.approx(binomtest(10, 35).pvalue)
    # The usual approximation, with its continuity correction
    assert p == pytest.approx(chi2.sf((abs(10 - 25) - 1) ** 2 / 35, 1), abs=0.005)
    assert mcnemar(first, first) == (0, 0, 1.0)


def test_differences_name_keys_of_either():
    first = {"optimizer": {"lr": 1.0, "eps": None}, "seed": 0, "resume": "a"}
    second = {"optimizer": {"lr": 2.0}, "seed": 0, "resume": "b", "new": 3}
    assert find_differences(first, second) == [("optimizer.lr", 1.0, 2.0), ("new", None, 3)]


@pytest.fixture
def worse_run(digits_run, tmp_path):
    """A copy of the run, whose best checkpoint predicts without looking at the image."""
    worse = tmp_path / "worse"
    shutil.copytree(digits_run[0], worse)
    best = worse / "checkpoints" / "best.safetensors"
    tensors, header = read_checkpoint(best)
    tensors["head.weight"] = tensors["head.weight"] * 0
    write_checkpoint(best, tensors, header)
    return worse


def test_two_runs_on_the_same_images(digits_run, worse_run):
    folder, _ = digits_run
    text = compare([folder, worse_run], "test", 0)
    assert f"{folder} is better" in text
    assert f"{folder} is better" in compare([worse_run, folder], "test", 0)
    assert "p = " in text
    assert "the same, apart from" in text
    assert "no more than chance" in compare([folder, folder], "val", 0)


def test_the_tables_show_both_runs(digits_run, worse_run):
    config = worse_run / "config.yaml"
    text = config.read_text()
    assert "\nseed: 0\n" in text
    config.write_text(text.replace("\nseed: 0\n", "\nseed: 7\n"))
    (worse_run / "result.json").unlink()
    lines = compare([digits_run[0], worse_run], "test", 0).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert ["key", str(digits_run[0]), str(worse_run)] in rows
    assert ["seed", "0", "7"] in rows
    assert ["status", "finished", ""] in rows


def test_a_folder_that_is_not_a_run(digits_run, tmp_path, capsys):
    with pytest.raises(ConfigError, match="not a run folder"):
        compare([digits_run[0], tmp_path], "test", 0)
    arguments = [str(digits_run[0]), str(tmp_path)]
    assert run_command("vit.compare", lambda: main(arguments)) == 2
    assert capsys.readouterr().err.startswith(f"vit.compare: {tmp_path}: ")


def test_images_of_other_classes_are_not_paired(tmp_path):
    """As many of each class, so that the labels alone look alike."""
    for run, classes in (("pets", ["cat", "dog"]), ("cars", ["bus", "van"])):
        root = write_classes(tmp_path / "data" / run, classes, count=20)
        best = tmp_path / run / "checkpoints" / "best.safetensors"
        write_best(best, classes, "data=folder", f"data.root={root}")
    with pytest.raises(ConfigError, match="test images are not the same"):
        compare_predictions([tmp_path / "pets", tmp_path / "cars"], "test", 0)


def test_a_lost_worker_ends_in_one_line(tmp_path, monkeypatch):
    root = write_classes(tmp_path / "pets", ["cat", "dog"], count=20)
    best = tmp_path / "run" / "checkpoints" / "best.safetensors"
    write_best(best, ["cat", "dog"], "data=folder", f"data.root={root}")
    lose_workers(monkeypatch)
    with pytest.raises(ConfigError, match="--workers: a process that decodes images died"):
        predict_split(tmp_path / "run", "test", 1)
    with pytest.raises(ConfigError, match="--workers must be 0 or more"):
        main(["a", "b", "--workers", "-1"])


def test_predictions_are_the_same_where_memory_ends(digits_run, monkeypatch, capsys):
    folder, _ = digits_run
    expected = predict_split(folder, "test", 0)
    restore = vit.evaluation.restore.restore
    with contextlib.ExitStack() as stack:

        def limited(*arguments):
            restored = restore(*arguments)
            stack.enter_context(memory_of(restored.model, 50))
            return restored

        monkeypatch.setattr("vit.evaluation.restore.restore", limited)
        predictions = predict_split(folder, "test", 0)
    assert torch.equal(predictions.correct, expected.correct)
    assert "memory ended with 64 images at once" in capsys.readouterr().out
