"""Where evaluate.py writes."""

from pathlib import Path

import pytest

from vit.errors import ConfigError
from vit.evaluation.outputs import Outputs, make_writable


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
    outputs = Outputs.of(checkpoint, out, split, {})
    assert outputs.file == Path(file)
    assert outputs.run == (None if run is None else Path(run))


def test_the_reports_folder_is_named_after_the_split():
    assert Outputs.of(None, "x", "test", {}).report_folder == Path("x/report")
    assert Outputs.of(None, "x", "val", {}).report_folder == Path("x/report_val")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"checkpoint": "best.safetensors", "precision": "fp32", "views": "one"}, ""),
        # The run's own images, which lie elsewhere now
        ({"data.root": "/mnt/pets"}, ""),
        ({"views": "mirrored", "model.image_size": [32, 48]}, "_image_size=32-48_views=mirrored"),
        ({"data": {"name": "folder"}, "data.root": "night/test"}, "_data=folder_root=night-test"),
        ({"data.eval_crop": None, "data.limit": 100}, "_limit=100_eval_crop=None"),
    ],
)
def test_another_protocol_leaves_the_runs_own_numbers(changes, name):
    outputs = Outputs.of("runs/1/checkpoints/best.safetensors", None, "val", changes)
    assert outputs.file == Path(f"runs/1/evaluation_val{name}.json")
    assert outputs.report_folder == Path(f"runs/1/report_val{name}")
    # Whoever names a folder knows what is in it
    outputs = Outputs.of("runs/1/checkpoints/best.safetensors", "x", "test", changes)
    assert outputs.file == Path("x/evaluation.json")


def test_a_long_path_makes_a_name_that_can_be_written():
    changes = {"data": {"name": "folder"}, "data.root": "/" + "bilder/" * 60}
    outputs = Outputs.of("runs/1/checkpoints/best.safetensors", None, "test", changes)
    assert outputs.file.name.endswith("bilder-bilder.json")
    assert len(outputs.file.name) < 100


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    make_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/report.* out=FOLDER$"):
        make_writable(tmp_path / "file" / "report")
