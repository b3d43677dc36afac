"""card.md: that it says what the run's files hold, and a command that begins the same run."""

import json
import re
import shlex
import shutil
import subprocess

from helpers import ROOT, TINY, train

import vit.runs.card
from vit.evaluation.accuracy import wilson_interval
from vit.runs.card import COLUMNS, command_line, curve, project_version, write_card

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
    "steps": 1200,
    "val_top1": 0.75,
    "best_step": 900,
    "seconds": 3725.0,
    "test_top1": 0.7,
    "test_loss": 1.25,
    "params": 1234567,
    "images_per_second": 20.5,
}


def write(folder, result, rows):
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "timing.jsonl").write_text(
        '{"step": 1, "memory_bytes": 1073741824}\n{"step": 2, "memory_bytes": 2147483648}\n'
    )
    write_card(
        folder,
        SETTINGS,
        "python train.py seed=7",
        {"classes": 3, "train": "a|b, 500 images"},
        10**9,
        "bf16 on cpu",
    )
    return (folder / "card.md").read_text(encoding="utf-8")


def cells(text):
    """{name: value} of all the page's tables."""
    return dict(re.findall(r"^\| (\S.*?) \| (.*) \|$", text, re.MULTILINE))


def test_made_up_values(tmp_path):
    rows = [
        {"step": 1, "split": "train", "loss": 2.0},
        {"step": 2, "split": "val", "n": 100, "loss": 1.5, "top1": 0.75},
        {"step": 2, "split": "test", "n": 400, "loss": 1.25, "top1": 0.7},
    ]
    text = write(tmp_path, RESULT, rows)
    told = cells(text)
    low, high = wilson_interval(0.7, 400)
    assert told["test top-1"].startswith(f"70.00% ({low:.2%} to {high:.2%}) of 400 images")
    assert told["validation top-1"].startswith("75.00%")
    assert "of 100 images" in told["validation top-1"]
    assert "after step 900" in told["validation top-1"]
    assert told["optimizer muon"] == "lr 0.02"
    assert told["train"] == "batch_size 64, loss bce"  # what does nothing is left out
    assert told["time"] == "1:02:05"
    assert told["parameters"] == "1,234,567"
    assert told["GFLOPs an image"] == "2 forward, 6 in training"
    assert told["peak memory"] == "2.00 GiB"
    assert "a\\|b, 500 images" in text  # a bar would end the cell
    assert text.startswith("# vit_x on folder: 70.00% test top-1\n")


def test_nothing_held_out(tmp_path):
    told = cells(
        write(
            tmp_path,
            {**RESULT, "val_top1": None, "best_step": 1200},
            [{"step": 1, "split": "test", "n": 9}],
        )
    )
    assert "validation top-1" not in told


def test_curves():
    assert curve("x", []) == ""
    assert curve("x", [1, 2, 3, 8]).split()[1] == "▁▂▃█"
    assert curve("x", [5.0, 5.0]).split()[1:] == ["▁▁", "5", "to", "5"]
    long = curve("x", list(range(1000)))
    assert len(long.split()[1]) == COLUMNS
    assert long.endswith("0 to 999")


def test_the_command_survives_a_resume(tmp_path):
    config = tmp_path / "config.yaml"
    first = command_line(config, ["experiment=digits", "data.root=my pictures"], 0)
    assert first == "python train.py experiment=digits 'data.root=my pictures' seed=0"
    config.write_text(f"# {first}\nmodel: {{}}\n")
    assert command_line(config, ["resume=outputs/x"], 0) == first
    assert shlex.split(
        command_line(config, ["resume=x", "resume_changed=allow", "seed=3", "train.epochs=9"], 3)
    )[2:] == ["experiment=digits", "data.root=my pictures", "seed=3", "train.epochs=9"]


def test_no_git_and_no_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(vit.runs.card, "ROOT", tmp_path)
    assert project_version() == "no git checkout"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert project_version() == "no git checkout"


def test_another_projects_git_is_not_ours(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        return
    identity = ["-c", "user.name=a", "-c", "user.email=b"]
    for words in (["init"], [*identity, "commit", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, capture_output=True, check=True)
    monkeypatch.setattr(vit.runs.card, "ROOT", tmp_path)
    assert project_version().startswith("commit ")
    (tmp_path / "copied").mkdir()
    monkeypatch.setattr(vit.runs.card, "ROOT", tmp_path / "copied")
    assert project_version() == "no git checkout"


def test_a_real_runs_card_has_the_numbers_of_its_result(digits_run):
    folder = digits_run[0]
    result, text = (
        json.loads((folder / "result.json").read_text()),
        (folder / "card.md").read_text(encoding="utf-8"),
    )
    told = cells(text)
    assert told["test top-1"].startswith(f"{result['test_top1']:.2%} (")
    assert told["validation top-1"].startswith(f"{result['val_top1']:.2%} (")
    assert told["length"] == f"{result['steps']} steps"
    assert told["speed"].startswith(f"{result['images_per_second']:g} images/s")
    assert told["parameters"] == f"{result['params']:,}"
    command = text.partition("```bash\n")[2].splitlines()[0]
    assert command == (folder / "config.yaml").read_text().splitlines()[0].removeprefix("# ")


def test_its_command_repeats_the_run(digits_run, tmp_path):
    folder = digits_run[0]
    command = (
        (folder / "card.md").read_text(encoding="utf-8").partition("```bash\n")[2].splitlines()[0]
    )
    words = shlex.split(command)
    assert words[:2] == ["python", "train.py"]
    assert set(TINY) <= set(words)
    done = train(tmp_path, *words[2:], "hydra.run.dir=again")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == (
        folder / "metrics.jsonl"
    ).read_bytes()
    assert (ROOT / words[1]).is_file()
