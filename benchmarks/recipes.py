"""Run recipes over several seeds, in pieces, and print one table of their accuracies and times.

    python benchmarks/recipes.py cifar10_vit_ti4 cifar10_vit_s4 --seeds 5 --minutes 9

Every job has its own run folder below --out. After --minutes the current run is asked to save and
to stop; the same command resumes it, until all are done. What follows a -- is given to every run
(train.epochs=1 for a try in miniature). Exit codes: 0 all done, 75 there is more to do, else that
of the run that failed.
"""

import argparse
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# The script is started by its path, and the repository is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.reporting import table_header, table_row
from benchmarks.training_runs import ROOT, train_command
from vit.files import read_json

# The exit code of a run that was stopped and can be resumed
STOPPED = 75
COLUMNS = ("experiment", "seeds", "val top-1", "test top-1", "seconds a run", "images/s")


def run_all(experiments: list[str], seeds: int, out: Path, end: float, overrides: list[str]) -> int:
    """Train what is not finished until `end`, a time of time.monotonic().

    Returns the exit code: 0 where all are done, STOPPED, or that of the first run that failed.
    """
    for seed in range(seeds):
        for experiment in experiments:
            folder = job_folder(out, experiment, seed)
            if read_result(folder) is not None:
                continue
            seconds_left = end - time.monotonic()
            if seconds_left < 0:
                return STOPPED
            job = [f"experiment={experiment}", f"seed={seed}", *overrides, "resume=auto"]
            code = run_piece(train_command(job, folder), seconds_left)
            if code != 0:
                return code
    return 0


def run_piece(command: list[str], seconds: float) -> int:
    """Train until done or until the seconds are over, and return the exit code."""
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    # Killed by the signal itself, before it could handle it or had anything to save
    return STOPPED if code == -signal.SIGTERM else code


def job_folder(out: Path, experiment: str, seed: int) -> Path:
    return out / experiment / f"seed_{seed}"


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return a run's result.json, or None where the run is not finished."""
    result = read_json(folder / "result.json")
    return result if result.get("status") == "finished" else None


def results_table(experiments: list[str], seeds: int, out: Path) -> str:
    """Return the table of all finished runs, a row an experiment."""
    lines = [table_header(*COLUMNS)]
    for experiment in experiments:
        folders = [job_folder(out, experiment, seed) for seed in range(seeds)]
        results = [read_result(folder) for folder in folders]
        finished = [result for result in results if result is not None]
        row = table_row(
            experiment,
            str(len(finished)),
            mean_and_deviation(finished, "val_top1", ".2f", scale=100),
            mean_and_deviation(finished, "test_top1", ".2f", scale=100),
            mean_and_deviation(finished, "seconds", ".1f"),
            mean_and_deviation(finished, "images_per_second", ".0f"),
        )
        lines.append(row)
    return "\n".join(lines)


def mean_and_deviation(
    results: list[dict[str, Any]], key: str, number_format: str, scale: float = 1
) -> str:
    """Format "mean ± standard deviation" of a key's values, as far as there are values."""
    # A run that held nothing out has no validation accuracy
    values = [scale * result[key] for result in results if result.get(key) is not None]
    if not values:
        return ""
    mean = f"{statistics.mean(values):{number_format}}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):{number_format}}"


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return this script's arguments, and those for every run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="+")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0, help="of this piece")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "recipes")

    # Cut by hand, since argparse would take the words after -- for experiments
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    return parser.parse_args(given[:cut]), given[cut + 1 :]


def main() -> int:
    arguments, overrides = parse_arguments()
    experiments, seeds = arguments.experiments, arguments.seeds
    out = arguments.out.resolve()
    end = time.monotonic() + 60 * arguments.minutes
    code = run_all(experiments, seeds, out, end, overrides)

    print(f"\n{results_table(experiments, seeds, out)}\n")
    messages = {0: "all runs are done", STOPPED: "there is more to do: run the same command again"}
    print(messages.get(code, f"a run failed, exit code {code}"))
    return code


if __name__ == "__main__":
    sys.exit(main())
