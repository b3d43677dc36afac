"""Several processes: the same run as one, whoever dies or is stopped. Real processes, started by torchrun or by train.py."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, make_images, run

from vit.augment.batch import BatchAugmentation
from vit.augment.mixing import MixupCutmix
from vit.augment.policies import build_policies
from vit.data.datasets import load_data
from vit.data.loader import evaluation_batches
from vit.data.preprocessing import Preprocessing
from vit.data.sample_order import SampleOrder
from vit.data.training_transform import TrainingTransform
from vit.evaluation.accuracy import evaluate
from vit.runtime.precision import Precision
from vit.runtime.processes import Processes
from vit.training.batches import Augmentation, training_batches

CPU = torch.device("cpu")
STEPS = 50
RUN = [
    "experiment=digits",
    f"train.steps={STEPS}",
    "train.log_every=1",
    "train.eval_every=1000",
    "train.ema_decay=0",
    "optimizer=sgd",
    "optimizer.lr=0.02",
    "train.precision=fp32",
    "model.drop_path=0.1",
    "augment.mixup=0.2",
    "augment.cutmix=1",
    "augment.erasing=0.3",
    "model.num_layers=2",
    "train.save_every=5",
]


def start(cwd, *arguments, processes=None):
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    if processes is not None:
        command[1:1] = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def rows(folder, split):
    return [
        row
        for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if row["split"] == split
    ]


def wait_for_step(folder, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len(rows(folder, "train")) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(process.communicate(timeout=5))


def require_same(folder, expected):
    """Every loss, of a run by other processes: the sums are the same but for their order."""
    losses, wanted = ([row["loss"] for row in rows(path, "train")] for path in (folder, expected))
    assert losses == pytest.approx(wanted, rel=1e-5)
    for split in ("val", "test"):
        (found,), (known,) = rows(folder, split), rows(expected, split)
        assert (found["n"], found["top1"]) == (
            known["n"],
            pytest.approx(known["top1"], abs=2 / known["n"]),
        )
        assert found["loss"] == pytest.approx(known["loss"], rel=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    process = start(folder, *RUN, "hydra.run.dir=run")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return folder / "run"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("batch_size", [10, 11, 64])
def test_every_sample_is_some_processs_and_pairs_stay_together(count, batch_size):
    parts = [range(batch_size)[Processes(rank, count).part(batch_size)] for rank in range(count)]
    assert [place for part in parts for place in part] == list(range(batch_size))
    assert all(part.start % 2 == 0 and len(part) > 0 for part in parts)


@pytest.mark.parametrize("name", ["digits", "folder"])
@pytest.mark.parametrize("count", [2, 4])
def test_the_parts_of_a_batch_are_the_batch(tmp_path, name, count):
    root = str(make_images(tmp_path, {"train": 12})) if name == "folder" else None
    channels = 3 if name == "folder" else 1
    data = load_data(
        name=name,
        root=root,
        val_fraction=0.1,
        test_fraction=0.1,
        limit=None,
        image_size=(16, 16),
        num_channels=channels,
        num_classes=None,
        num_images=None,
        device=CPU,
    )
    preprocessing = Preprocessing((16, 16), channels, (0.5,), (0.25,), 0.875, "bilinear")
    policies = build_policies("randaugment", 2, 9, 0.3) if channels == 3 else []
    augmentation = Augmentation(
        TrainingTransform(preprocessing, [0.2, 1.0], 0.5, policies),
        BatchAugmentation(5, (16, 16), 0.0, [0.2, 1.0], 0.5, policies),
        0.5,
        MixupCutmix(5, len(data.classes), 0.8, 1.0, 0.9),
    )

    def stream(rank, processes):
        return training_batches(
            data.train,
            SampleOrder(len(data.train), 10, 5),
            0,
            3,
            preprocessing,
            augmentation,
            0,
            CPU,
            Processes(rank, processes).part(10),
        )

    for whole, *parts in zip(
        stream(0, 1), *(stream(rank, count) for rank in range(count)), strict=True
    ):
        for kind in (0, 1):
            assert torch.equal(torch.cat([part[kind] for part in parts]), whole[kind])


@pytest.mark.parametrize(("n", "count"), [(23, 2), (23, 4), (3, 4), (24, 4)])
def test_evaluation_counts_every_image_once_whatever_remains(n, count):
    data = load_data(
        name="digits",
        root=None,
        val_fraction=0.1,
        test_fraction=0.2,
        limit=None,
        image_size=(8, 8),
        num_channels=1,
        num_classes=None,
        num_images=None,
        device=CPU,
    )
    images = data.test.subset(torch.arange(n))
    preprocessing = Preprocessing((8, 8), 1, (0.3,), (0.4,), None, "bilinear")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    expected = evaluate(
        model, evaluation_batches(images, 5, preprocessing, 0, CPU), Precision("fp32", CPU)
    )
    sums, lengths = [], []

    def collect(own):
        sums.append(own)
        return own.clamp(
            min=1
        )  # what this process alone makes of it is not looked at, and it may have no image

    for rank in range(count):
        batches = list(evaluation_batches(images, 5, preprocessing, 0, CPU, rank, count))
        lengths.append([len(labels) for _, labels in batches])
        evaluate(model, batches, Precision("fp32", CPU), over_processes=collect)
    assert all(
        length == lengths[0] for length in lengths
    )  # or some would wait for the others for ever
    found = torch.stack(sums).sum(0).tolist()
    assert [found[0], found[1] / n, found[2] / n, found[3] / n] == pytest.approx(
        [expected["n"], expected["loss"], expected["top1"], expected["top5"]]
    )


def test_fifty_steps_are_those_of_one_process(tmp_path):
    """AdamW in float64, with micro-batches of other sizes and drop path, and a batch that no number of processes splits
    evenly."""
    found = {}
    for count, micro in ((1, 14), (2, 3), (4, 2)):
        out = tmp_path / f"{count}.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={count}",
            str(ROOT / "tests" / "distributed_steps.py"),
            "adamw",
            str(out),
            str(micro),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[count] = json.loads(out.read_text())
    for count in (2, 4):
        for key in ("loss", "top1", "norm"):
            assert found[count][key] == pytest.approx(found[1][key], rel=1e-9)


def test_two_processes_a_killed_one_and_one_that_goes_on_alone(tmp_path, alone):
    """torchrun with two processes, the second killed in the middle: all end, the reason is told, and one process resumes."""
    process = start(tmp_path, *RUN, "hydra.run.dir=run", processes=2)
    wait_for_step(tmp_path / "run", 12, process)
    victims = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(victims) == 2
    killed = time.monotonic()
    os.kill(int(victims[1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=100)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert "SIGKILL" in errors
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] in ("failed", "stopped")
    resumed = start(tmp_path, "resume=run")
    _, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors[-2000:]
    require_same(tmp_path / "run", alone)


def test_a_stopped_launcher_saves_and_two_processes_go_on(tmp_path, alone):
    """Two processes, each with half of the state, stopped by SIGTERM: exit code 75, resumable by two again, as it was."""
    process = start(
        tmp_path, *RUN, "runtime.processes=2", "runtime.sharding=fsdp", "hydra.run.dir=run"
    )
    wait_for_step(tmp_path / "run", 12, process)
    process.terminate()
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 75, errors[-2000:]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "stopped"
    before = len(rows(tmp_path / "run", "train"))
    assert before < STEPS
    resumed = start(tmp_path, "resume=run")
    out, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors[-2000:]
    assert "2 processes" in out
    require_same(tmp_path / "run", alone)
    assert [path.name for path in tmp_path.iterdir()] == [
        "run"
    ]  # no folder of the other process is left


def test_mistakes_are_told_once_and_the_exit_code_comes_through(tmp_path):
    done = run(
        "train.py",
        "experiment=digits",
        "runtime.processes=2",
        "train.batch_size=3",
        "hydra.run.dir=run",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.count("train.batch_size=3 is for all 2 processes together") == 1
    assert "Traceback (most recent call last)" not in done.stderr.split("train.batch_size=3")[0]
    done = run("train.py", "experiment=digits", "runtime.processes=0", cwd=tmp_path)
    assert (done.returncode, "runtime.processes must be a positive number" in done.stderr) == (
        2,
        True,
    )
