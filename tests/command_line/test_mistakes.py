"""How a command ends that can't be carried out: one line and an exit code, or a bug's traceback."""

import re

import pytest
import torch
from helpers import ROOT, TINY, error_line, read_result, run, train

from vit.checkpoints.file import read_checkpoint

TRAIN_MISTAKES = [
    (["optimizer.lrr=1"], r"optimizer\.lrr\b.*optimizer\.lr\b"),
    (["model=vit_b17"], r"model=vit_b17\b.*vit_b16\b"),
    (["optimizer.lr=-1"], r"optimizer\.lr\b.*-1"),
    (["model.num_heads=5"], r"num_heads\b.*384.*\b5\b"),
    (["model.patch_size=5"], r"patch_size\b.*5.*image_size\b.*32"),
    (["experiment=digits", "train.batch_size=5000"], r"train\.batch_size=5000\b.*1,?151"),
    (["experiment=digits", "train.steps=10", "schedule.warmup=10"], r"schedule\.warmup\b.*10"),
    (["data=imagenet"], r"data=imagenet\b.*data/imagenet/train\b.*data\.root="),
    (["data=folder"], r"data=folder\b.*data\.root="),
    (["resume=nowhere"], r"resume=nowhere\b.*checkpoint"),
    (["hydra.run.dir=/proc/nowhere"], r"/proc/nowhere\b.*hydra\.run\.dir="),
    (["runtime.device=cuda"], r"runtime\.device=cuda\b.*cpu"),
]
EVALUATE_MISTAKES = [
    ([], r"checkpoint="),
    (["checkpoint=nowhere.safetensors"], r"nowhere\.safetensors\b"),
    (["split=tset"], r"split\b.*train, val.*tset"),
]
MISTAKES = [
    *(("train.py", *mistake) for mistake in TRAIN_MISTAKES),
    *(("evaluate.py", *mistake) for mistake in EVALUATE_MISTAKES),
]
PLANTED_BUG = """
import vit.evaluation.accuracy as accuracy

def broken(*arguments):
    raise KeyError("planted")

accuracy.evaluate = broken
"""


@pytest.mark.parametrize(
    ("script", "arguments", "pattern"),
    MISTAKES,
    ids=[" ".join([script, *arguments]) for script, arguments, _ in MISTAKES],
)
def test_a_mistake_is_one_line(tmp_path, script, arguments, pattern):
    """It names the key or the path; a refused command leaves no files."""
    if "runtime.device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert re.search(pattern, error_line(run(script, *arguments, cwd=tmp_path)))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if path.name != "data"] == []


def test_damaged_checkpoints_are_refused(digits_run, tmp_path):
    checkpoints = digits_run[0] / "checkpoints"
    best = (checkpoints / "best.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(best[:-100])
    done = run("evaluate.py", "checkpoint=cut.safetensors", cwd=tmp_path)
    assert "cut.safetensors" in error_line(done)
    done = run("evaluate.py", f"checkpoint={checkpoints}/last.safetensors", cwd=tmp_path)
    assert re.search(r"last\.safetensors\b.*best\.safetensors\b", error_line(done))


def test_the_last_good_checkpoint_is_kept_when_a_run_diverges(tmp_path):
    done = train(
        tmp_path,
        *TINY,
        "train.steps=60",
        "optimizer=sgd",
        "optimizer.lr=1e30",
        "train.clip_norm=null",
        "schedule.warmup=0",
        "hydra.run.dir=run",
    )
    line = error_line(done, code=3)
    assert re.search(r"\b(nan|inf)\b.*step \d+.*optimizer\.lr\b", line)
    assert read_result(tmp_path / "run")["status"] == "failed"
    tensors, header = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.safetensors")
    assert header["progress"]["step"] == 0
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.slow
def test_a_bug_keeps_its_traceback(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(PLANTED_BUG)
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = train(tmp_path, *TINY, "train.steps=2", "hydra.run.dir=run", env=environment)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'planted'" in done.stderr
    assert "planted" in read_result(tmp_path / "run")["reason"]
