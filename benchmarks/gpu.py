"""All that is to be measured on a GPU, in pieces that go on where they stopped.

    python benchmarks/gpu.py --out FOLDER                # again and again, until it exits with 0
    python benchmarks/gpu.py --out FOLDER --piece input  # one piece, from its start
    python benchmarks/gpu.py --out FOLDER --miniature    # tiny ones, on whatever is there

Each call works for at most --minutes, and half a minute to stop, and exits with 75 where more is to
do. A piece is a process of its own and writes FOLDER/<piece>.md; what has been finished is not
measured again. One that failed leaves FOLDER/<piece>.failed, and is tried again after the others.

    tests     tests/gpu: parity with the CPU, resuming, memory, waits
    kernels   the rate of matrix products, attention, augmentation of small images
    steps_*   steps of training beside timm, eager and compiled: images/s, MFU, memory
    input     JPEGs from the cores and by nvJPEG
    profiles  the kernels of the first model, and of the one that uses the GPU least
    recipes   whole runs on CIFAR, resumed from call to call
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# The script is started by its path, and the repository is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from vit.files import write_text

ROOT = Path(__file__).parent.parent
SIZES = ["vit_s16", "vit_b16", "vit_l16", "vit_s4", "vit_ti4"]
MINIATURE_SIZES = ["vit_nano4"]
RECIPES = ["cifar10_fast_gpu", "cifar10_vit_s4", "cifar100_vit_s4"]
# Exit code: there is more to do, by the same command
STOPPED = 75
# What a process that is asked to stop may take to do it
STOPPING_SECONDS = 30
# Of one size: two contestants are compiled, which takes up to two minutes each
STEPS_MINUTES = 5


@dataclass(frozen=True)
class Piece:
    """A table of its own.

    command: what measures it, after Python; OUT and MINUTES are put in. minutes: without as many it
    is not begun. writes: whether the command writes the table itself, or its output is the table.
    """

    name: str
    command: Sequence[str]
    minutes: float
    writes: bool = True
    environment: dict[str, str] = field(default_factory=dict)

    def arguments(self, out: Path, minutes: float) -> list[str]:
        words = {"OUT": str(out), "MINUTES": f"{minutes:.2f}"}
        return [sys.executable, *(words.get(word, word) for word in self.command)]


@dataclass(frozen=True)
class Request:
    """What is asked for: the folder of the tables, miniatures or the real, and where data are."""

    out: Path
    miniature: bool = False
    jpegs: Path | None = None
    data_root: Path | None = None


def pieces(request: Request) -> dict[str, Piece]:
    """Return all pieces by name, in the order in which they are measured.

    What is profiled depends on what has been measured.
    """
    miniature = request.miniature
    tiny = ["--miniature"] if miniature else []
    # By name, and as many as have passed, which the project's own -q would leave out twice
    tests = ["-m", "pytest", "-vv", "-rs", "tests/gpu"]
    environment = {}
    if miniature:
        tests += ["-k", "test_every_optimizer"]
        environment = {"VIT_TEST_DEVICE": "cpu"}
    kernels = ["benchmarks/gpu_steps.py", "--kernels", *tiny, "--out", "OUT"]
    jpegs = ["benchmarks/gpu_input.py", *tiny, "--out", "OUT"]
    if request.jpegs is not None:
        jpegs += ["--jpegs", str(request.jpegs.resolve())]
    ordered = [
        Piece("tests", tests, 6, writes=False, environment=environment),
        Piece("kernels", kernels, 2),
        *(steps_of(size, tiny) for size in (MINIATURE_SIZES if miniature else SIZES)),
        Piece("input", jpegs, 4),
        profiles(request.out, tiny),
        recipes(request),
    ]
    return {piece.name: piece for piece in ordered}


def steps_of(size: str, tiny: list[str]) -> Piece:
    """Return the piece that measures training steps of one size."""
    command = ["benchmarks/gpu_steps.py", "--size", size, *tiny, "--minutes", "MINUTES"]
    return Piece(f"steps_{size}", [*command, "--out", "OUT"], STEPS_MINUTES)


def profiles(out: Path, tiny: list[str]) -> Piece:
    """Return the piece that profiles the first size and the one farthest from the ceiling."""
    fractions = measured_fractions(out)
    sizes = []
    if fractions and not tiny:
        # In the order of measuring; one size may be both
        sizes = list(
            dict.fromkeys([next(iter(fractions)), min(fractions, key=fractions.__getitem__)])
        )
    chosen = [word for size in sizes for word in ("--size", size)]
    command = ["benchmarks/gpu_profile.py", *tiny, *chosen, "--out", "OUT"]
    # No shorter than the steps, or it would be begun before these
    return Piece("profiles", command, STEPS_MINUTES)


def recipes(request: Request) -> Piece:
    """Return the piece that trains whole recipes."""
    names = [name for name in RECIPES if (ROOT / "conf/experiment" / f"{name}.yaml").exists()]
    overrides: list[str] = []
    if request.data_root is not None:
        overrides.append(f"data.root={request.data_root.resolve()}")
    if request.miniature:
        names = ["digits"]
        overrides = ["model.num_layers=1", "model.hidden_size=16", "model.num_heads=1"]
        overrides += ["train.epochs=1", "runtime.threads=1"]
    command = ["benchmarks/recipes.py", *names, "--seeds", "1", "--minutes", "MINUTES"]
    command += ["--out", str(request.out / "runs"), "--", *overrides]
    return Piece("recipes", command, 2, writes=False)


def measured_fractions(out: Path) -> dict[str, float]:
    """Return {size: fraction of the ceiling that our compiled model reached} of finished tables."""
    fractions = {}
    for size in SIZES:
        file = out / f"steps_{size}.md"
        rows = file.read_text().splitlines() if file.exists() else []
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
        for row in cells:
            # model, project, images/s, ours is faster by, of the ceiling, …
            if len(row) > 4 and row[1] == "ours compiled" and row[4].endswith("%"):
                fractions[size] = float(row[4].rstrip("%")) / 100
    return fractions


def run_piece(piece: Piece, out: Path, end: float) -> int:
    """Measure a piece until `end`, a time of time.monotonic().

    Its table is in the folder once it is finished. Returns 0, STOPPED where the time was over, or
    the exit code of the command that failed.
    """
    unfinished = out / f"{piece.name}.part"
    seconds = max(1.0, end - time.monotonic())
    # A little less for the command's own limit, so that it ends by itself
    command = piece.arguments(unfinished, max(0.02, (seconds - STOPPING_SECONDS) / 60))
    print(f"{piece.name}: {' '.join(command[1:])}", flush=True)
    output = None if piece.writes else subprocess.PIPE
    # Else what it prints would be lost where it has to be ended
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **piece.environment}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, text=True, start_new_session=True
    )
    try:
        text, _ = process.communicate(timeout=seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        text, code = end_group(process), STOPPED
    except KeyboardInterrupt:
        # A terminal sends it to this process alone
        end_group(process)
        raise
    if not piece.writes:
        print(text, flush=True)
        write_text(unfinished, text)
    if code == 0:
        unfinished.rename(out / f"{piece.name}.md")
    return code


def end_group(process: subprocess.Popen[str]) -> str:
    """Ask a process and those that it has started to end, and then make them; returns the output.

    A training would go on without the script that has started it, and keep the output open.
    """
    os.killpg(process.pid, signal.SIGTERM)
    try:
        text, _ = process.communicate(timeout=STOPPING_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
    return text


def run_pieces(
    request: Request, names: Sequence[str], end: float, again: bool = False
) -> tuple[int, list[str]]:
    """Measure the pieces of these names that are not finished until `end`.

    Those that failed in a call before come last, so that they do not take the time of the others.
    again: also those that are. Returns the exit code and a line about each piece that failed.
    """
    failed = []
    out = request.out
    some_wait = False
    for name in sorted(names, key=lambda name: failure_of(out, name).exists()):
        if not again and (out / f"{name}.md").exists():
            continue
        piece = pieces(request)[name]
        # A shorter one may still fit, such as a recipe, which goes on with its steps
        if end - time.monotonic() < 60 * piece.minutes:
            some_wait = True
            continue
        code = run_piece(piece, out, end)
        if code == STOPPED:
            return STOPPED, failed
        note_failure(out, name, code)
        # The others may work; this one is tried again by a later call
        if code != 0:
            failed.append(f"{name} failed, exit code {code}: {failure_of(out, name)}")
    if some_wait:
        return STOPPED, failed
    return (1 if failed else 0), failed


def failure_of(out: Path, name: str) -> Path:
    """Return the file of what a piece that failed has printed or measured."""
    return out / f"{name}.failed"


def note_failure(out: Path, name: str, code: int) -> None:
    """Leave that file where a piece ended with an error, and none where it did not."""
    unfinished, failure = out / f"{name}.part", failure_of(out, name)
    if code == 0:
        failure.unlink(missing_ok=True)
        return
    failure.touch()
    # It may have ended before it wrote anything
    if unfinished.exists():
        unfinished.rename(failure)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of the tables")
    parser.add_argument("--minutes", type=float, default=9.5, help="of this call")
    parser.add_argument("--piece", action="append", help="only these, measured anew")
    parser.add_argument("--miniature", action="store_true", help="try the script without a GPU")
    parser.add_argument("--jpegs", type=Path, help="a folder of JPEGs; default: made up")
    parser.add_argument("--data-root", type=Path, help="data.root of the recipes")
    arguments = parser.parse_args()
    request = Request(
        arguments.out.resolve(), arguments.miniature, arguments.jpegs, arguments.data_root
    )
    request.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes

    known = list(pieces(request))
    names = arguments.piece or known
    if not set(names) <= set(known):
        parser.error(f"--piece must be one of {', '.join(known)}")
    code, failed = run_pieces(request, names, end, again=bool(arguments.piece))
    print("\n".join(failed))
    messages = {0: "all is measured", STOPPED: "there is more to do: run the same command again"}
    print(messages.get(code, "what failed is tried again by the same command"))
    return code


if __name__ == "__main__":
    sys.exit(main())
