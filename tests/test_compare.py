"""python -m vit.compare: configurations, metrics and a paired test of two runs."""

import shutil

import pytest
import torch
from scipy.stats import binomtest, chi2

from vit.checkpoints.file import read_checkpoint, write_checkpoint
from vit.compare import compare, differences, mcnemar
from vit.errors import ConfigError


def test_mcnemars_test_is_the_exact_binomial():
    first = torch.tensor([True] * 60 + [False] * 40)
    second = torch.tensor([True] * 50 + [False] * 10 + [True] * 25 + [False] * 15)
    only_first, only_second, p = mcnemar(first, second)
    assert (only_first, only_second) == (10, 25)
    assert p == pytest.approx(binomtest(10, 35).pvalue)
    assert p == pytest.approx(
        chi2.sf((abs(10 - 25) - 1) ** 2 / 35, 1), abs=0.005
    )  # the usual approximation
    assert mcnemar(first, first) == (0, 0, 1.0)


def test_differences_name_keys_of_either():
    first, second = (
        {"optimizer": {"lr": 1.0, "eps": None}, "seed": 0},
        {"optimizer": {"lr": 2.0}, "seed": 0, "new": 3},
    )
    assert differences(first, second) == [("optimizer.lr", 1.0, 2.0), ("new", None, 3)]


def test_two_runs_on_the_same_images(digits_run, tmp_path):
    folder, _ = digits_run
    worse = tmp_path / "worse"
    shutil.copytree(folder, worse)
    best = worse / "checkpoints" / "best.safetensors"
    tensors, header = read_checkpoint(best)
    write_checkpoint(
        best,
        {
            name: tensor * 0 if name.startswith("head.weight") else tensor
            for name, tensor in tensors.items()
        },
        header,
    )
    told = compare([folder, worse], "test", 0)
    assert f"{folder} is better" in told
    assert "p = " in told
    assert "the same, but for where" in told
    assert "no more than chance" in compare([folder, folder], "val", 0)
    with pytest.raises(ConfigError, match="no run folder"):
        compare([folder, tmp_path], "test", 0)
