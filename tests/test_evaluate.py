"""The command evaluate.py: its measurements and the report of a real run."""

import contextlib
import json
from pathlib import Path

import pytest
from helpers import ROOT, run
from hydra import compose, initialize_config_dir
from limited_memory import memory_of

import vit.evaluation.restore
from evaluate import check_source, measure
from vit.checkpoints.file import read_checkpoint
from vit.config.config import EvaluateConfig, from_composed, register
from vit.config.settings import check_settings
from vit.errors import ConfigError
from vit.evaluation.corruptions import CORRUPTIONS


def settings(*overrides: str) -> EvaluateConfig:
    """What the command line gives with these overrides."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return from_composed(compose("evaluate", list(overrides)))


def test_a_real_run(digits_run, tmp_path):
    folder, _ = digits_run
    done = run(
        "evaluate.py",
        f"checkpoint={folder}/checkpoints/best.safetensors",
        "report=true",
        "knn=true",
        "corruptions=true",
        "out=out",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    # As training measured it, without these options
    assert numbers["top1"] == result["test_top1"]
    assert numbers["loss"] == result["test_loss"]
    assert numbers["nll"] == pytest.approx(numbers["loss"], rel=1e-6)
    assert 0 < numbers["ece"] < 1
    assert numbers["nll_at_temperature"] < numbers["nll"] + 0.05
    assert numbers["knn_top1"] > 0.8
    assert set(numbers["corruptions"]) == set(CORRUPTIONS)
    assert 0.1 < numbers["corruptions_top1"] < numbers["top1"] + 0.02

    text = (tmp_path / "out" / "report" / "index.html").read_text()
    for part in (
        "Confusion",
        "Calibration",
        "Corruptions",
        "Most confident mistakes",
        "Least confident hits",
        "Attention",
        "Patch filters",
        "place, from",
        "learning curves",
        "training speed",
        "optimizer.lr",
        "20-NN",
    ):
        assert part in text
    names = {path.name for path in (tmp_path / "out" / "report").iterdir()}
    assert {
        "confusion.png",
        "confusion_dark.png",
        "calibration.png",
        "curves.png",
        "filters.png",
        "positions.png",
    } <= names
    assert f"report: {Path('out') / 'report' / 'index.html'}" in done.stdout


def test_weights_without_a_run_and_the_validation_split(digits_run, tmp_path):
    path = digits_run[0] / "checkpoints" / "best.safetensors"
    overrides = [f"pretrained='{path}'", "data=digits", "data.limit=20", "split=val"]
    text = measure(settings(*overrides, "report=true", f"out='{tmp_path}'"), {})
    assert "report_val" in text
    page = (tmp_path / "report_val" / "index.html").read_text()
    for part in ("came without one", "no metrics.jsonl", "these figures flatter"):
        assert part in page


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(digits_run, tmp_path):
    (tmp_path / "file").write_text("")
    path = digits_run[0] / "checkpoints" / "best.safetensors"
    given = settings(f"checkpoint='{path}'", "report=true", f"out='{tmp_path / 'file'}'")
    with pytest.raises(ConfigError, match=r"file/report: .*Not a directory.* out=FOLDER$"):
        measure(given, {})


def test_precision_and_batch_size(digits_run, tmp_path, capsys, monkeypatch):
    path = digits_run[0] / "checkpoints" / "best.safetensors"

    def evaluated(*overrides: str) -> dict:
        measure(settings(f"checkpoint='{path}'", f"out='{tmp_path}'", *overrides), {})
        return json.loads((tmp_path / "evaluation.json").read_text())

    as_trained = evaluated()
    header = read_checkpoint(path)[1]
    assert as_trained["precision"] == header["precision"]
    assert evaluated("precision=bf16")["precision"] == "bf16"
    assert evaluated("precision=auto")["precision"] in ("bf16", "fp32")
    exact = evaluated("precision=fp32")
    assert exact["loss"] == pytest.approx(as_trained["loss"], rel=0.02)

    # The model has room for 100 images: 359 are tried, then 180, and 90 fit
    restore = vit.evaluation.restore.restore
    stack = contextlib.ExitStack()

    def limited(*arguments):
        restored = restore(*arguments)
        stack.enter_context(memory_of(restored.model, 100))
        return restored

    monkeypatch.setattr(vit.evaluation.restore, "restore", limited)
    with stack:
        numbers = evaluated("precision=fp32", "batch_size=1000")
    assert numbers["n"] == 359
    assert numbers["top1"] == exact["top1"]
    assert numbers["loss"] == pytest.approx(exact["loss"], rel=1e-6)
    assert "memory ended with 180 images at once: from here on 90" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "key"),
    [("precision=fp8", "precision"), ("batch_size=0", "batch_size"), ("batch_size=-3", "batch")],
)
def test_values_out_of_range_are_refused(override, key):
    with pytest.raises(ConfigError, match=key):
        check_settings(settings("checkpoint=a", override))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([], "checkpoint="),
        (["checkpoint=a", "pretrained=b"], "checkpoint="),
        (["checkpoint=a", "data=digits", "data.mirror=true"], r"data\.mirror="),
        (["checkpoint=a", "model=vit_s4"], "model="),
    ],
)
def test_a_source_of_weights_and_nothing_beside_it(overrides, key):
    given = settings(*overrides)
    changes = {override.partition("=")[0]: None for override in overrides}
    with pytest.raises(ConfigError, match=key):
        check_source(given, changes)
