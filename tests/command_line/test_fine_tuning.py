"""Fine-tuning of a part of the weights by real processes: frozen blocks and low-rank changes."""

import json
import signal

import pytest
import torch
from helpers import ROOT, TINY, error_line, read_result, rows, run, train, train_to_step

from vit.checkpoints.file import read_checkpoint

pytestmark = pytest.mark.slow

# The upper of two blocks has low-rank changes; all that is random in training is on
TUNED = [
    *TINY,
    "train.freeze=blocks:1",
    "train.lora_rank=4",
    "model.dropout=0.1",
    "model.drop_path=0.2",
    "train.precision=fp32",
    "train.epochs=4",
    "train.log_every=1",
    "train.save_every=5",
    "train.ema_decay=0.9",
    "optimizer.lr=0.003",
    "runtime.threads=1",
]
STEPS = 36


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run to start from, `base`, and one that tunes it, `whole`."""
    folder = tmp_path_factory.mktemp("tuning")
    options = ("train.epochs=2", "optimizer.lr=0.003", "hydra.run.dir=base")
    done = train(folder, *TINY, *options)
    assert done.returncode == 0, done.stderr
    done = tune(folder, "whole")
    assert done.returncode == 0, done.stderr
    assert "of them trained" in done.stdout
    return folder


def tune(folder, name, *arguments, **options):
    return train(folder, *command(folder, name), *arguments, **options)


def command(folder, name):
    base = folder / "base" / "checkpoints" / "best.safetensors"
    return [*TUNED, f"pretrained={base}", "resume=auto", f"hydra.run.dir={name}"]


def tensors(run, name):
    return read_checkpoint(run / "checkpoints" / f"{name}.safetensors")[0]


def test_only_what_was_asked_for_is_trained_and_the_best_weights_are_merged(folder):
    base, last, best = (
        tensors(folder / run, name)
        for run, name in (("base", "best"), ("whole", "last"), ("whole", "best"))
    )
    assert best.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], best[name])}
    matrices = ("query", "key", "value", "projection")
    upper = {f"encoder.blocks.1.attention.{name}.weight" for name in matrices}
    assert changed == upper | {"head.weight", "head.bias"}
    # The state has the weights as they were, and what is added to them
    assert all(torch.equal(last[f"model/{name}"], base[name]) for name in upper)
    states = {name.split("/")[1] for name in last if name.startswith("optimizer/")}
    added = {
        f"encoder.blocks.1.attention.{name}.{part}.weight"
        for name in matrices
        for part in ("down", "up")
    }
    assert states == added | {"head.weight", "head.bias"}


def test_a_killed_run_resumes_to_the_same_bits(folder):
    process = train_to_step(12, *command(folder, "parts"), cwd=folder, run="parts")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    resumed = train(folder, "resume=parts")
    assert resumed.returncode == 0, resumed.stderr
    for name in ("last", "best"):
        ours, theirs = tensors(folder / "parts", name), tensors(folder / "whole", name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    texts = [(folder / run / "metrics.jsonl").read_text() for run in ("parts", "whole")]
    assert texts[0] == texts[1]
    changed = error_line(train(folder, "resume=parts", "train.lora_rank=8"))
    assert "train.lora_rank: 4 → 8" in changed


def test_nothing_that_reads_the_best_weights_knows_how_they_were_trained(folder):
    checkpoint = folder / "whole" / "checkpoints" / "best.safetensors"
    arguments = (f"checkpoint={checkpoint}", "split=val", "out=.", "runtime.threads=1")
    done = run("evaluate.py", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((folder / "evaluation_val.json").read_text())
    result = read_result(folder / "whole")
    logged = {
        row["step"]: row
        for row in rows(folder / "whole" / "metrics.jsonl")
        if row["split"] == "val"
    }
    assert evaluation["top1"] == result["val_top1"]
    assert evaluation["loss"] == logged[result["best_step"]]["loss"]
    base = read_result(folder / "base")
    assert result["params"] == base["params"]
    # Of the same images less is computed: two FLOPs of the frozen part, four behind it
    assert result["pflops"] / result["steps"] < 0.7 * base["pflops"] / base["steps"]

    out = folder / "timm"
    done = run("vit.export", str(checkpoint), "--format", "timm", "--out", str(out), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    # The whole state too, whose averaged weights are those of its last step
    last = folder / "whole" / "checkpoints" / "last.safetensors"
    arguments = (f"pretrained={last}", "data=digits", "split=val", "out=.", "runtime.threads=1")
    done = run("evaluate.py", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((folder / "evaluation_val.json").read_text())
    assert evaluation["loss"] == pytest.approx(logged[STEPS]["loss"], rel=1e-6)


@pytest.mark.parametrize("sharding", [pytest.param("none", marks=pytest.mark.long), "fsdp"])
def test_several_processes_train_the_same(folder, sharding):
    settings = (
        "model.dropout=0",  # it alone depends on how the batch is split
        "optimizer=sgd",
        "optimizer.lr=0.05",
        "runtime.activation_checkpointing=true",
    )
    name = f"one_{sharding}"
    done = tune(folder, name, *settings)
    assert done.returncode == 0, done.stderr
    several = f"two_{sharding}"
    processes = ("runtime.processes=2", f"runtime.sharding={sharding}")
    done = tune(folder, several, *settings, *processes, timeout=600)
    assert done.returncode == 0, done.stderr
    losses = [
        [row["loss"] for row in rows(folder / run / "metrics.jsonl") if row["split"] == "train"]
        for run in (name, several)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, two = (tensors(folder / run, "best") for run in (name, several))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-5)
    # Stopped nowhere, but resumed after its end by one process
    done = train(folder, f"resume={several}", "runtime.processes=1", "runtime.sharding=none")
    assert done.returncode == 0, done.stderr
