"""Where evaluate.py writes."""

from pathlib import Path

import pytest

from vit.errors import ConfigError
from vit.evaluation.outputs import Outputs, make_writable, of_another_protocol


@pytest.mark.parametrize(
    ("checkpoint", "out", "split", "file", "run"),
    [
        ("runs/1/checkpoints/best.safetensors", None, "test", "runs/1/evaluation.json", "runs/1"),
        ("runs/1/checkpoints/best.safetensors", "x", "val", "x/evaluation_val.json", "runs/1"),
        ("weights/best.safetensors", None, "train", "weights/evaluation_train.json", None),
        (None, None, "test", "evaluation.json", None),
        (None, "x", "test", "x/evaluation.json", None),
    ],
)
def test_evaluation_json_lies_in_the_run_folder_or_out(checkpoint, out, split, file, run):
    outputs = Outputs.of(checkpoint, out, split)
    assert outputs.file == Path(file)
    assert outputs.run == (None if run is None else Path(run))


def test_the_current_folder_may_be_that_of_the_checkpoints(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path / "checkpoints")
    outputs = Outputs.of("best.safetensors", None, "test")
    assert outputs.file.resolve() == tmp_path / "evaluation.json"
    assert outputs.run == Path("..")
    monkeypatch.chdir(tmp_path)
    assert Outputs.of("best.safetensors", None, "test").run is None


def test_the_folder_of_a_run_may_be_given(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "best.safetensors").touch()
    outputs = Outputs.of(str(tmp_path / "run"), None, "test")
    assert (outputs.folder, outputs.run) == (tmp_path / "run", tmp_path / "run")


def test_the_reports_folder_is_named_after_the_split():
    assert Outputs.of(None, "x", "test").report_folder == Path("x/report")
    assert Outputs.of(None, "x", "val").report_folder == Path("x/report_val")


@pytest.mark.parametrize("text", [None, "", "{", '{"top1": 0.5}'])
def test_of_no_earlier_numbers_nothing_is_said(tmp_path, text):
    """There are none, their file is damaged, or it is of a version without protocols."""
    file = tmp_path / "evaluation.json"
    if text is not None:
        file.write_text(text)
    assert of_another_protocol(file, {"views": "one view"}) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    make_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/report.* out=FOLDER$"):
        make_writable(tmp_path / "file" / "report")
