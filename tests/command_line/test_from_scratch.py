"""Programs started from scratch, as a user starts them; other tests fork them from a parent."""

import json
import resource
import subprocess
import sys

import pytest
from helpers import DIGITS, ROOT, make_images, read_result, run, train

from vit.checkpoints.file import read_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scratch_run(tmp_path_factory):
    """The same run as digits_run, but in a process of its own from the start."""
    folder = tmp_path_factory.mktemp("scratch")
    done = train(folder, *DIGITS, "hydra.run.dir=run", from_scratch=True)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_run_from_scratch_is_the_forked_run(digits_run, scratch_run):
    """The same bits, though other modules had been imported before and hashes have another seed."""
    forked = digits_run[0]
    for name in ("metrics.jsonl", "config.yaml"):
        assert (scratch_run / name).read_bytes() == (forked / name).read_bytes()
    for key in ("val_top1", "test_top1", "test_loss", "best_step", "steps", "status"):
        assert read_result(scratch_run)[key] == read_result(forked)[key]
    for name in ("best", "last"):
        ours, theirs = (
            read_checkpoint(folder / "checkpoints" / f"{name}.safetensors")[0]
            for folder in (scratch_run, forked)
        )
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in theirs)


def test_evaluating_from_scratch(scratch_run):
    checkpoint = f"checkpoint={scratch_run}/checkpoints/best.safetensors"
    done = run("evaluate.py", checkpoint, cwd=scratch_run, from_scratch=True)
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((scratch_run / "evaluation.json").read_text())
    assert evaluation["top1"] == read_result(scratch_run)["test_top1"]


def test_predicting_from_scratch(scratch_run, tmp_path):
    make_images(tmp_path, {"some": 1}, size=(8, 8))
    checkpoint = str(scratch_run / "checkpoints" / "best.safetensors")
    command = ["vit.predict", checkpoint, str(tmp_path), "--format", "json"]
    done = run(*command, cwd=ROOT, from_scratch=True)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 2
    assert {"image", "predictions"} <= answers[0].keys()


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_and_mistakes_need_no_torch(script, tmp_path):
    """torch takes seconds to import; these are answered at once."""
    for arguments, code in ((["--help"], 0), (["optimizer.lrr=1"], 2)):
        command = [sys.executable, "-X", "importtime", str(ROOT / script), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code
        imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
        assert "omegaconf" in imported
        assert "torch" not in imported


def test_a_mistaken_command_is_answered_in_three_seconds(tmp_path):
    """Of the processor's time: a busy machine may take longer."""
    before = used_by_children()
    done = train(tmp_path, "train.epochs=0", from_scratch=True)
    assert done.returncode == 2
    assert used_by_children() - before < 3


def used_by_children() -> float:
    """Seconds of the processor of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
