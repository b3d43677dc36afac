"""card.md: that it says what the run's files hold, and a command that begins the same run."""

import json
import re
import shlex
import shutil
import subprocess

import pytest
from helpers import ROOT, TINY, train

import vit.runs.card
from vit.evaluation.accuracy import wilson_interval
from vit.runs.card import COLUMNS, curve, curves, project_version, repeat_command, write_card
from vit.runs.timing import Cost

SETTINGS = {
    "model": {
        "name": "vit_x",
        "num_layers": 3,
        "hidden_size": 96,
        "num_heads": 6,
        "image_size": [24, 32],
        "patch_size": 8,
    },
    "data": {"name": "folder"},
    "augment": {"flip": 0.5, "mixup": None, "repeats": 1},
    "pretrained": None,
    "seed": 7,
    "optimizer": {"name": "muon", "lr": 0.02, "betas": None},
    "schedule": {"name": "linear", "warmup": "5ep"},
    "train": {"batch_size": 64, "freeze": "none", "ema_decay": 0.0, "loss": "bce", "log_every": 50},
}
RESULT = {
    "status": "finished",
    "reason": "all steps done",
    "steps": 1200,
    "select": "top1",
    "val_top1": 0.75,
    "val_macro_f1": 0.7,
    "best_step": 900,
    "seconds": 3725.0,
    "test_top1": 0.7,
    "test_loss": 1.25,
    "test_balanced_top1": 0.65,
    "test_macro_f1": 0.6,
    "params": 1234567,
    "images_per_second": 20.5,
    "pflops": 0.5612,
    "product_rate_share": 0.43,
}
METRICS = [
    {"step": 1, "split": "train", "loss": 2.0},
    {"step": 2, "split": "val", "n": 100, "loss": 1.5, "top1": 0.75},
    {"step": 2, "split": "test", "n": 400, "loss": 1.25, "top1": 0.7},
]
TIMING = [{"step": 1, "memory_bytes": 2**30}, {"step": 2, "memory_bytes": 2**31}]


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder, result=RESULT, metrics=METRICS):
    """The card's text."""
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text(as_lines(metrics))
    (folder / "timing.jsonl").write_text(as_lines(TIMING))
    data = {"classes": 3, "train": "a|b, 500 images"}
    write_card(folder, SETTINGS, "python train.py seed=7", data, Cost(10**9, 6e9), "bf16 on cpu")
    return (folder / "card.md").read_text(encoding="utf-8")


def cells(text):
    """{name: value} of all the page's tables."""
    return {
        name: value.rstrip()
        for name, value in re.findall(r"^\| (\S.*?) +\| (.*) \|$", text, re.MULTILINE)
    }


def first_command(text):
    return text.partition("```bash\n")[2].splitlines()[0]


def test_the_card_says_what_the_files_hold(tmp_path):
    text = write(tmp_path)
    values = cells(text)
    low, high = wilson_interval(0.7, 400)
    assert values["test top-1"].startswith(f"70.00% ({low:.2%} to {high:.2%}) of 400 images")
    assert values["validation top-1"].startswith("75.00%")
    assert "of 100 images" in values["validation top-1"]
    assert "after step 900" in values["validation top-1"]
    assert values["optimizer muon"] == "lr 0.02"
    assert values["train"] == "batch_size 64, loss bce"  # what does nothing is left out
    assert values["time"] == "1:02:05"
    assert values["parameters"] == "1,234,567"
    assert values["GFLOPs an image"] == "2 forward, 6 in training"
    assert values["peak memory"] == "2.00 GiB"
    assert "a\\|b, 500 images" in text  # a bar would end the cell
    assert text.startswith("# vit_x on folder: 70.00% test top-1\n")


def test_the_card_says_what_was_selected_by_and_tells_of_unbalanced_classes(tmp_path):
    assert "test macro F1" not in cells(write(tmp_path))
    metrics = [{**row, "balanced_top1": 0.5} for row in METRICS]
    values = cells(write(tmp_path, {**RESULT, "select": "macro_f1"}, metrics))
    assert values["validation top-1"].startswith("75.00%")
    assert values["validation top-1"].endswith("selected for being the best in macro F1, 70.00%")
    assert (values["test balanced accuracy"], values["test macro F1"]) == ("65.00%", "60.00%")


def test_nothing_held_out(tmp_path):
    result = {**RESULT, "val_top1": None, "best_step": 1200}
    text = write(tmp_path, result, [{"step": 1, "split": "test", "n": 9}])
    assert "validation top-1" not in cells(text)


def test_curves_are_bars_from_the_lowest_to_the_highest():
    assert curve("x", [1, 2, 3, 8]).split()[1] == "▁▂▃█"
    assert curve("x", [5.0, 5.0]).split()[1:] == ["▁▁", "5", "to", "5"]
    long = curve("x", list(range(1000)))
    assert len(long.split()[1]) == COLUMNS
    assert long.endswith("0 to 999")


def test_a_curve_without_numbers_is_left_out():
    assert curves([]) == []
    assert curves([{"step": 2, "split": "test", "n": 9, "loss": 1.0}]) == []
    assert [line.split("  ")[0].strip() for line in curves(METRICS)] == [
        "train loss",
        "val loss",
        "val top1",
    ]


def test_the_command_survives_a_resume(tmp_path):
    config = tmp_path / "config.yaml"
    first = repeat_command(config, ["experiment=digits", "data.root=my pictures"], 0)
    assert first == "python train.py experiment=digits 'data.root=my pictures' seed=0"
    config.write_text(f"# {first}\nmodel: {{}}\n")
    assert repeat_command(config, ["resume=outputs/x"], 0) == first
    changes = ["resume=x", "resume_changed=allow", "seed=3", "train.epochs=9"]
    words = shlex.split(repeat_command(config, changes, 3))
    expected = ["experiment=digits", "data.root=my pictures", "seed=3", "train.epochs=9"]
    assert words == ["python", "train.py", *expected]


def test_the_command_is_one_line():
    command = repeat_command(ROOT / "missing.yaml", ["data.root=a\nb"], 0)
    assert "\n" not in command


def test_no_git_and_no_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(vit.runs.card, "ROOT", tmp_path)
    assert project_version() == "no git checkout"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert project_version() == "no git checkout"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_another_projects_git_is_not_ours(tmp_path, monkeypatch):
    identity = ["-c", "user.name=a", "-c", "user.email=b"]
    for words in (["init"], [*identity, "commit", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, capture_output=True, check=True)
    monkeypatch.setattr(vit.runs.card, "ROOT", tmp_path)
    assert project_version().startswith("commit ")
    (tmp_path / "copied").mkdir()
    monkeypatch.setattr(vit.runs.card, "ROOT", tmp_path / "copied")
    assert project_version() == "no git checkout"


def test_a_real_runs_card_has_the_numbers_of_its_result(digits_run):
    folder, _ = digits_run
    result = json.loads((folder / "result.json").read_text())
    text = (folder / "card.md").read_text(encoding="utf-8")
    values = cells(text)
    assert values["test top-1"].startswith(f"{result['test_top1']:.2%} (")
    assert values["validation top-1"].startswith(f"{result['val_top1']:.2%} (")
    assert values["length"] == f"{result['steps']} steps; all steps done"
    assert values["speed"].startswith(f"{result['images_per_second']:g} images/s")
    assert values["parameters"] == f"{result['params']:,}"
    first_line = (folder / "config.yaml").read_text().splitlines()[0]
    assert first_command(text) == first_line.removeprefix("# ")


def test_its_command_repeats_the_run(digits_run, tmp_path):
    folder, _ = digits_run
    words = shlex.split(first_command((folder / "card.md").read_text(encoding="utf-8")))
    assert words[:2] == ["python", "train.py"]
    assert (ROOT / words[1]).is_file()
    assert set(TINY) <= set(words)
    done = train(tmp_path, *words[2:], "hydra.run.dir=again")
    assert done.returncode == 0, done.stderr
    again = (tmp_path / "again" / "metrics.jsonl").read_bytes()
    assert again == (folder / "metrics.jsonl").read_bytes()
