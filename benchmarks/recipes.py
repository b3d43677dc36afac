"""Runs recipes over several seeds, in pieces, and prints one table of their accuracies and times.

    python benchmarks/recipes.py cifar10_vit_ti4 cifar10_vit_s4 --seeds 5 --minutes 9 --out outputs/recipes

Every job is a run folder of its own under --out. After --minutes the run at work is told to save and stop; the same command
goes on with it, until all are done. Further words after -- are given to every run (train.epochs=1 for a try in miniature).
Exit codes: 0 all done, 75 more to do, else that of the run that failed.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_piece(
    experiment: str, seed: int, folder: Path, seconds: float, overrides: list[str]
) -> int:
    """Train until done or until `seconds` are over; train.py's exit code (75: saved, to be gone on with)."""
    child = subprocess.Popen(
        [
            sys.executable,
            "train.py",
            f"experiment={experiment}",
            f"seed={seed}",
            *overrides,
            "resume=auto",
            f"hydra.run.dir={folder}",
        ],
        cwd=ROOT,
    )
    try:
        return child.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGTERM)
        code = child.wait()
        return (
            75 if code == -signal.SIGTERM else code
        )  # it had not got as far as a handler, or anything to save


def table(experiments: list[str], seeds: int, out: Path) -> str:
    lines = [
        "| experiment | seeds | val top-1 | test top-1 | seconds a run | images/s |",
        "|---|---|---|---|---|---|",
    ]
    for experiment in experiments:
        files = [out / experiment / f"seed_{seed}" / "result.json" for seed in range(seeds)]
        results = [json.loads(file.read_text()) for file in files if file.exists()]
        results = [result for result in results if result["status"] == "finished"]

        def spread(key: str, scale: float, form: str, results: list[dict] = results) -> str:
            values = [scale * result[key] for result in results if result.get(key) is not None]
            deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
            return f"{statistics.mean(values):{form}}{deviation}" if values else ""

        cells = [
            experiment,
            str(len(results)),
            spread("val_top1", 100, ".2f"),
            spread("test_top1", 100, ".2f"),
            spread("seconds", 1, ".1f"),
            spread("images_per_second", 1, ".0f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="+")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0, help="of this piece")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "recipes")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, overrides = sys.argv[1:cut], sys.argv[cut + 1 :]
    arguments = parser.parse_args(own)
    out, end, code = arguments.out.resolve(), time.monotonic() + 60 * arguments.minutes, 0
    for seed in range(arguments.seeds):
        for experiment in arguments.experiments:
            folder = out / experiment / f"seed_{seed}"
            result = folder / "result.json"
            if code or (result.exists() and json.loads(result.read_text())["status"] == "finished"):
                continue
            code = (
                75
                if time.monotonic() > end
                else run_piece(experiment, seed, folder, end - time.monotonic(), overrides)
            )
    print(f"\n{table(arguments.experiments, arguments.seeds, out)}\n")
    told = {0: "all runs are done", 75: "there is more to do: run the same command again"}
    print(told.get(code, f"a run failed, exit code {code}"))
    return code


if __name__ == "__main__":
    sys.exit(main())
