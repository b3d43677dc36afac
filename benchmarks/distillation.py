"""Train a small student on digits alone and with a better teacher, over seeds; print a table.

    python benchmarks/distillation.py    # ten minutes on two CPU cores

Both are trained on the same 302 images: the teacher by the recipe `digits`, the student, with two
layers of width 32, with mixup and CutMix, and taught in each of the ways that there are. "Alone, at
its cost" is the student without a teacher and with as many more steps as they are cheaper. Runs
that are finished below --out are not repeated. What follows a -- is given to every student.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The script is started by its path, and the repository is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.reporting import Report, table_header, table_row
from benchmarks.training_runs import ROOT, train_command
from vit.files import read_json

# So few images that a small model needs help: 302 to train on, 1,136 and 359 to measure on
DATA = [
    "experiment=digits",
    "data.val_fraction=0.79",
    "train.batch_size=64",
    "train.eval_every=20",
    "train.attention_every=null",
]
# With the augmentation of the recipe
TEACHER = [*DATA, "train.steps=2000"]
STEPS = 600
STUDENT = [
    *DATA,
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=2",
    # For the student alone better than the recipe's, and than none
    "augment=none",
    "augment.mixup=0.8",
    "augment.cutmix=1",
]
COLUMNS = ("student", "val top-1", "test top-1", "test top-1 of each seed", "ahead", "PFLOPs")


def ways(teacher: Path, steps: int, longer: float) -> dict[str, list[str]]:
    """Return {how the student is trained: the overrides that say so}.

    teacher: its run folder; longer: how many times as expensive a step with it is.
    """
    taught = [f"train.teacher={teacher}", f"train.steps={steps}"]
    token = "model.distill_token=true"
    return {
        "alone": [f"train.steps={steps}"],
        "soft": [*taught, "train.distillation=soft"],
        "hard": [*taught, "train.distillation=hard"],
        "soft, with a token": [*taught, "train.distillation=soft", token],
        "hard, with a token": [*taught, "train.distillation=hard", token],
        "alone, at its cost": [f"train.steps={round(steps * longer)}"],
    }


def result_of(overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return the result of a run, which is made where it is not finished yet.

    Raises subprocess.CalledProcessError where it fails.
    """
    file = folder / "result.json"
    if not file.exists() or read_json(file)["status"] != "finished":
        command = train_command([*overrides, "resume=auto"], folder)
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return read_json(file)


def row_of(name: str, results: list[dict[str, Any]], alone: list[dict[str, Any]]) -> str:
    """Return a row of the table: means over the seeds, with their standard deviations."""
    val, test = ([result[key] for result in results] for key in ("val_top1", "test_top1"))
    pairs = zip(test, [result["test_top1"] for result in alone], strict=True)
    ahead = sum(ours > theirs for ours, theirs in pairs)
    pflops = statistics.fmean(result["pflops"] for result in results)
    each = ", ".join(f"{100 * top1:.2f}" for top1 in test)
    seeds = "" if results is alone else f"{ahead} of {len(results)}"
    return table_row(name, spread(val), spread(test), each, seeds, f"{pflops:.2g}")


def spread(top1s: Sequence[float]) -> str:
    """Return mean and standard deviation in per cent: "97.1 ± 0.4 %"."""
    percents = [100 * top1 for top1 in top1s]
    deviation = statistics.stdev(percents) if len(percents) > 1 else 0.0
    return f"{statistics.fmean(percents):.1f} ± {deviation:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="students of each kind (default 5)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each (default {STEPS})")
    parser.add_argument("--out", type=Path, default=Path("outputs/distillation"), help="folder")
    parser.add_argument("overrides", nargs="*", help="of every student, after --")
    arguments = parser.parse_args()
    out, report = arguments.out.resolve(), Report(None)

    teacher = result_of(TEACHER, out / "teacher")
    report.add(
        f"teacher: val {teacher['val_top1']:.2%}, test {teacher['test_top1']:.2%}, "
        f"{teacher['params']:,} parameters",
        "",
        table_header(*COLUMNS),
    )
    students: dict[str, list[dict[str, Any]]] = {}
    longer = cost_of_teaching(out, arguments)
    for name, own in ways(out / "teacher", arguments.steps, longer).items():
        students[name] = [
            result_of(
                [*STUDENT, *own, f"seed={seed}", *arguments.overrides], folder_of(out, name, seed)
            )
            for seed in range(arguments.seeds)
        ]
        report.add(row_of(name, students[name], students["alone"]))


def folder_of(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(', ', '_').replace(' ', '_')}_seed{seed}"


def cost_of_teaching(out: Path, arguments: argparse.Namespace) -> float:
    """Return how many times as much work a student with the teacher is as one alone."""
    pflops = []
    for name in ("soft", "alone"):
        own = ways(out / "teacher", arguments.steps, 1.0)[name]
        overrides = [*STUDENT, *own, "seed=0", *arguments.overrides]
        pflops.append(result_of(overrides, folder_of(out, name, 0))["pflops"])
    return pflops[0] / pflops[1]


if __name__ == "__main__":
    main()
