"""A run that an earlier version of the program left: it is evaluated, loaded and resumed.

The first line of its config.yaml holds the command. It ran 18 steps; its last checkpoint was put
back to step 12.
"""

import json
import shutil

import pytest
from helpers import ROOT, rows, run, train

import vit
from vit.checkpoints.file import read_checkpoint

FIXTURE = ROOT / "tests" / "fixtures" / "run_of_an_earlier_version"
# The last bits differ from CPU to CPU, and with them now and then an image's class
TOLERANCE = {"loss": 1e-4, "grad_norm": 1e-3, "lr": 1e-12, "top1": 0.01, "top5": 0.01}


@pytest.fixture
def copy(tmp_path):
    """A copy of the run to work on."""
    return shutil.copytree(FIXTURE, tmp_path / "run")


def read(path):
    return json.loads(path.read_text())


def test_its_best_checkpoint_is_evaluated(copy, tmp_path):
    done = run("evaluate.py", f"checkpoint={copy}/checkpoints/best.safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    evaluation, result = read(copy / "evaluation.json"), read(FIXTURE / "result.json")
    assert evaluation["top1"] == pytest.approx(result["test_top1"], abs=0.003)  # of 359 images
    assert evaluation["loss"] == pytest.approx(result["test_loss"], rel=1e-4)


def test_its_best_checkpoint_is_loaded():
    path = FIXTURE / "checkpoints" / "best.safetensors"
    model = vit.load(path)
    result = read(FIXTURE / "result.json")
    assert model.num_parameters() == result["params"]
    assert model.classes == [str(digit) for digit in range(10)]
    assert model.preprocessing.image_size == (16, 16)
    assert read_checkpoint(path)[1]["progress"]["step"] == result["best_step"]


def test_it_is_resumed_to_its_own_end(copy, tmp_path):
    header = read_checkpoint(copy / "checkpoints" / "last.safetensors")[1]
    assert header["progress"]["step"] == 12
    done = train(tmp_path, f"resume={copy}")
    assert done.returncode == 0, done.stderr
    assert "after step 12" in done.stdout

    expected, resumed = rows(FIXTURE / "metrics.jsonl"), rows(copy / "metrics.jsonl")
    assert [row.keys() for row in resumed] == [row.keys() for row in expected]
    for ours, theirs in zip(resumed, expected, strict=True):
        for key, value in theirs.items():
            if key in TOLERANCE:
                value = pytest.approx(value, rel=TOLERANCE[key])
            assert ours[key] == value, (key, theirs["step"])
    ours, theirs = read(copy / "result.json"), read(FIXTURE / "result.json")
    for key in ("status", "steps", "best_step", "params"):
        assert ours[key] == theirs[key]
    assert ours["test_top1"] == pytest.approx(theirs["test_top1"], rel=TOLERANCE["top1"])
    assert ours["seconds"] > header["progress"]["seconds"]
