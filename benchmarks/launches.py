"""What training asks of a GPU, counted without one: kernels, waits of the host, sizes of copies.

    python benchmarks/launches.py --json launches.json

An emulated device stands in for the GPU (benchmarks/emulated_device.py). A kernel is an operation
that torch dispatches to the device; views are none. Counted are

- a steady step of `train.py model=vit_ti4 augment=deit` at batch 512 on images of 32 px in memory,
  with AdamW, clipping and averaged weights: calls with operands on two devices, places at which
  the host waits for the device, and the bytes of the largest copy to it;
- one step of each optimizer of conf/optimizer on ViT-Ti/4: kernels;
- the making of a batch of 512 with each policy and each file of conf/augment, all that lies between
  the images in memory and the model's input: kernels and waits.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hydra import compose, initialize_config_dir

# The script is started by its path, and the repository is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.emulated_device import EmulatedDevice, emulated_device
from train import train
from vit.augment.policies import POLICIES
from vit.checkpoints.model import build_model
from vit.config.config import CONF, Config, from_composed, register
from vit.files import write_json
from vit.runs.console import Console
from vit.runs.folder import RunFolder
from vit.runs.screen import Screen
from vit.runtime.machine import Machine
from vit.runtime.processes import Processes
from vit.runtime.signals import StopSignal
from vit.training import prepare
from vit.training.observer import Observer

BATCH_SIZE = 512
# As many classes as CIFAR-10, and images for a few batches that differ
DATA = ("data=synthetic", "data.num_classes=10", f"data.num_images={4 * BATCH_SIZE}")
MODEL = ("model=vit_ti4", "model.image_size=32")
# The first step sets things up, and the last one is followed by the log and an evaluation
STEPS = 4
STEADY = slice(2, -1)
STEP = (
    f"train.batch_size={BATCH_SIZE}",
    f"train.steps={STEPS}",
    "train.log_every=100",
    "train.eval_every=100",
    "augment=deit",
    "optimizer=adamw",
    "train.clip_norm=1",
    "train.ema_decay=0.999",
    "train.precision=bf16",
    "runtime.device=cuda",
    "runtime.workers=0",
    "runtime.compile=false",
)

register()


@dataclass(frozen=True)
class Asked:
    """What was asked of the device: calls that mix devices, waits, bytes of the largest copy."""

    mixed: int
    waits: int
    largest_copy: int
    launches: int

    @classmethod
    def of(cls, emulated: EmulatedDevice) -> "Asked":
        return cls(
            emulated.mixed.total(),
            emulated.waits.total(),
            emulated.largest_copy,
            emulated.launches,
        )

    @classmethod
    def most(cls, several: list["Asked"]) -> "Asked":
        """The largest of each number."""
        columns = zip(*(asdict(each).values() for each in several), strict=True)
        return cls(*(max(column) for column in columns))


def composed(*overrides: str) -> Config:
    """The configuration that `train.py overrides…` has."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return from_composed(compose("train", [*overrides]))


def files_of(group: str) -> list[str]:
    """The names of a configuration group's files."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def steady_step(*overrides: str) -> Asked:
    """Count in a short run of train.py, from the end of one step to the end of the next.

    overrides: of its command line, beside those of the table above.
    """
    config = composed(*MODEL, *DATA, *STEP, *overrides)
    with (
        tempfile.TemporaryDirectory() as folder,
        device_for_a_run() as emulated,
        noted_steps(emulated) as steps,
        RunFolder(Path(folder) / "run").outcome() as run,
    ):
        train(config, run, StopSignal(), [], Screen(speaks=False))
    return Asked.most(steps[STEADY])


@contextmanager
def device_for_a_run() -> Iterator[EmulatedDevice]:
    """An emulated device on which train.py can run quickly."""
    with (
        emulated_device("cuda", refuse_mixed=False) as emulated,
        mock.patch("vit.training.start.product_rate", return_value=1e15),
        # The lines on the screen, which come by the clock, are not part of every step
        mock.patch.object(Console, "wants_numbers", return_value=False),
        # What is drawn waits for the device, seldom
        mock.patch("vit.training.start.make_validation_board", return_value=None),
    ):
        yield emulated


@contextmanager
def noted_steps(emulated: EmulatedDevice) -> Iterator[list[Asked]]:
    """Note what each step of training asks of the device, the loop around it included."""
    steps: list[Asked] = []
    step_done = Observer.step_done

    def noted(self: Observer, *arguments: Any) -> None:
        step_done(self, *arguments)
        steps.append(Asked.of(emulated))
        emulated.forget()

    with mock.patch.object(Observer, "step_done", noted):
        yield steps


def optimizer_step(name: str) -> Asked:
    """Count in one step of an optimizer on ViT-Ti/4."""
    config = composed(*MODEL, f"optimizer={name}")
    with emulated_device("cuda") as emulated:
        model = build_model(asdict(config.model), 10).to(emulated.device)
        optimizer = prepare.build_optimizer_of(config, model)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        # The first one makes the moments
        optimizer.step()
        emulated.forget()
        optimizer.step()
        return Asked.of(emulated)


def batch_making(*overrides: str) -> Asked:
    """Count in the making of a step's batch from images in memory."""
    config = composed(*MODEL, *DATA, f"train.batch_size={BATCH_SIZE}", *overrides)
    with emulated_device("cuda") as emulated:
        machine = Machine(emulated.device, Processes(), workers=0, sharded=False)
        with tempfile.TemporaryDirectory() as folder:
            run = RunFolder(Path(folder) / "run")
            data = prepare.load_dataset(config, run, machine)
        batches = prepare.make_batches(config, data, machine, StopSignal())
        counts = []
        with closing(batches.training(0, 3)) as training:
            for _ in training:
                counts.append(Asked.of(emulated))
                emulated.forget()
    # Without the first, which sends what is kept
    return Asked.most(counts[1:])


def policies() -> dict[str, Asked]:
    """Count for each policy by itself, and for each file of conf/augment."""
    counts = {
        name: batch_making("augment=none", f"augment.policy={name}") for name in ("none", *POLICIES)
    }
    return counts | {name: batch_making(f"augment={name}") for name in files_of("augment")}


def measure() -> dict[str, Any]:
    """What the JSON holds."""
    step = steady_step()
    return {
        "mixed_devices": step.mixed,
        "host_waits_per_step": step.waits,
        "largest_copy_bytes": step.largest_copy,
        "optimizers": {name: optimizer_step(name).launches for name in files_of("optimizer")},
        "policies": {
            name: {"launches": counts.launches, "host_waits": counts.waits}
            for name, counts in policies().items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="the file to write")
    arguments = parser.parse_args()
    write_json(arguments.json, measure())
    print(arguments.json.read_text())


if __name__ == "__main__":
    main()
