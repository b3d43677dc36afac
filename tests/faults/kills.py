"""Runs that are killed at random moments and resumed by the same command."""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from faults.trials import RUN, Effort, Row, differences, digests, finish, must_finish
from helpers import ROOT, Program, make_images, start, wait_until
from torch import Tensor

from vit.checkpoints.file import read_checkpoint, write_checkpoint
from vit.checkpoints.run import BEST, LAST, PREVIOUS

MOST_SIGNALS = 4  # to one run
SECONDS_TO_END = 30  # after a signal
QUICK = ["train.epochs=8", "train.eval_every=2"]
# Of SIGTERM: saved; Python had not come to a handler; the run had finished anyway
GOOD_CODES = (75, -signal.SIGTERM, 0)


@dataclass
class Kills:
    """Where and what is killed. length: seconds of the whole run; expected: what it ends in."""

    work: Path
    command: list[str]
    length: float
    expected: dict[str, str]
    dice: random.Random
    from_scratch: bool

    def start(self, name: str) -> Program:
        """Start or resume a run with any number of loader workers, which must not matter."""
        workers = self.dice.choice((0, 1, 2))
        return start(
            "train.py",
            *self.command,
            f"hydra.run.dir={name}",
            f"runtime.workers={workers}",
            cwd=self.work,
            from_scratch=self.from_scratch,
        )

    def run_until_killed(self, name: str, number: signal.Signals, row: Row) -> bool:
        """Send the signal at a random moment of the run; False where the run was faster."""
        process = self.start(name)
        try:
            process.communicate(timeout=self.dice.uniform(0.2, self.length))
            return False
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        # Not for its loader workers, which notice a killed parent only after seconds
        try:
            process.wait(timeout=SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            row.count(False, f"{name}: still alive {SECONDS_TO_END} s after {number.name}")
        if number == signal.SIGTERM and process.returncode not in GOOD_CODES:
            _, errors = process.communicate()
            row.count(False, f"{name}: exit code {process.returncode}: {errors[-300:]}")
        return True

    def run_to_the_end(self, name: str) -> str:
        """What is wrong with a run that is resumed for the last time; empty: nothing."""
        process = self.start(name)
        _, errors = process.communicate(timeout=600)
        if process.returncode != 0:
            return f"exit code {process.returncode}: {errors[-300:]}"
        return differences(digests(self.work / name), self.expected)

    def row(self, number: signal.Signals, wanted: int) -> Row:
        """Runs that are killed up to four times each, until so many signals were sent."""
        row = Row(f"{number.name} at a random moment, resumed to the same bits")
        runs = 0
        while row.tried < wanted:
            runs += 1
            name, sent = f"{number.name}_{runs}", 0
            limit = min(MOST_SIGNALS, wanted - row.tried)
            while sent < limit and self.run_until_killed(name, number, row):
                sent += 1
            problem = self.run_to_the_end(name)
            for _ in range(sent):
                row.count(not problem, f"{name}: {problem}")
            shutil.rmtree(self.work / name)
        return row


def kills(work: Path, effort: Effort) -> Iterator[Row]:
    """From the first second of a run to its last, with SIGKILL and SIGTERM."""
    make_images(work / "images", {"train": 20 if effort.quick else 60, "test": 8})
    command = [*RUN, "resume=auto", *(QUICK if effort.quick else [])]
    began = time.monotonic()
    from_scratch = not effort.quick  # then the imports are a part of the run
    code, errors = finish(work, *command, "hydra.run.dir=whole", from_scratch=from_scratch)
    assert code == 0, errors
    length = time.monotonic() - began
    dice = random.Random(0)
    trial = Kills(work, command, length, digests(work / "whole"), dice, from_scratch)
    yield trial.row(signal.SIGKILL, 2 if effort.quick else effort.kills)
    yield trial.row(signal.SIGTERM, 1 if effort.quick else effort.kills)
    if not effort.quick:
        yield workers(trial)
    yield embeddings(trial, 1 if effort.quick else effort.kills)
    yield negative_controls(work, effort)


def workers(trial: Kills) -> Row:
    row = Row("any number of loader workers, one result")
    for count in (0, 2, 4):
        folder = f"workers_{count}"
        arguments = [*trial.command, f"hydra.run.dir={folder}", f"runtime.workers={count}"]
        code, errors = finish(trial.work, *arguments)
        same = code == 0 and not differences(digests(trial.work / folder), trial.expected)
        row.count(same, f"{count}: {errors[-300:]}")
    return row


def embeddings(trial: Kills, wanted: int) -> Row:
    """Files of features, of images that are named often enough for seconds of work."""
    row = Row("vit.embed: SIGKILL at a random moment, started again to the same bytes")
    best = str(trial.work / "whole" / "checkpoints" / BEST)
    images = [str(trial.work / "images")] * 20
    options = ("--batch-size", "4", "--workers", "0", "--out")

    def begin(name: str) -> Program:
        return start("vit.embed", best, *images, *options, str(trial.work / name), cwd=ROOT)

    began = time.monotonic()
    _, errors = begin("whole.npz").communicate(timeout=600)
    length = time.monotonic() - began
    assert not errors, errors
    for number in range(wanted):
        name = f"killed_{number}.npz"
        process = begin(name)
        try:
            process.communicate(timeout=trial.dice.uniform(0.2, length))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _, errors = begin(name).communicate(timeout=600)
        same = (
            not errors
            and (trial.work / name).read_bytes() == (trial.work / "whole.npz").read_bytes()
        )
        row.count(same, f"{name}: {errors[-300:]}")
    return row


def negative_controls(work: Path, effort: Effort) -> Row:
    """The comparison above would notice a state that lacks any one part."""
    row = Row("negative controls: a state that lacks a part is refused or ends in other bits")
    command = [*RUN, *QUICK, "train.epochs=6"]
    must_finish(work, *command, "hydra.run.dir=controls")
    expected = digests(work / "controls")

    process = start("train.py", *command, "hydra.run.dir=stopped", cwd=work)
    checkpoints = work / "stopped" / "checkpoints"
    wait_until((checkpoints / PREVIOUS).exists, process)
    process.terminate()
    process.communicate()
    tensors, header = read_checkpoint(checkpoints / LAST)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    parts = parts_of_a_state(header)
    for part in ("step", "/step") if effort.quick else parts:
        folder = work / "control"
        shutil.copytree(work / "stopped", folder)
        (folder / "checkpoints" / PREVIOUS).unlink(missing_ok=True)
        write_checkpoint(folder / "checkpoints" / LAST, *without(part, tensors, header))
        code, errors = finish(work, "resume=control")
        noticed = code != 0 or bool(differences(digests(folder), expected))
        good = noticed and "Traceback" not in errors
        row.count(good, f"{part}: exit code {code} {errors[-300:]}")
        shutil.rmtree(folder)
    return row


def parts_of_a_state(header: dict) -> list[str]:
    """Parts of tensors' names, and keys of the header and of the progress in it."""
    tensors = ["model/head.weight", "/exp_avg", "optimizer/", "/step", "average/", "model/"]
    keys = ["config", "classes", "precision", "progress", *header["progress"]]
    return [*tensors, *keys]


def without(part: str, tensors: dict[str, Tensor], header: dict) -> tuple[dict[str, Tensor], dict]:
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    rest = {key: value for key, value in header.items() if key != part}
    if "progress" in rest:
        progress = header["progress"].items()
        rest["progress"] = {key: value for key, value in progress if key != part}
    return kept, rest
