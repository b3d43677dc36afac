"""Peak memory of training on a CPU, a process each: two steps of every project.

python benchmarks/memory.py
"""

import argparse
import resource
import subprocess
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

CASES = [("vit_b16", 8), ("vit_s4", 128)]


def one(name: str, size: str, batch: int) -> float:
    """GiB of this process after two steps."""
    import torch

    from benchmarks.contestants import Contestant, make_step
    from vit.runtime.precision import Precision

    step = make_step(
        Contestant(name, False), size, batch, Precision("bf16", torch.device("cpu")), True
    )
    step()
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--one", nargs=3, metavar=("PROJECT", "SIZE", "BATCH"), help="measure one here"
    )
    arguments = parser.parse_args()
    if arguments.one:
        name, size, batch = arguments.one
        print(one(name, size, int(batch)))
        return
    print(f"{date.today()}, bf16\n\n| training | project | peak GiB |\n|---|---|---|")
    for size, batch in CASES:
        for name in ("ours", "timm", "huggingface", "torchvision", "vit_pytorch"):
            done = subprocess.run(
                [sys.executable, "-W", "ignore", __file__, "--one", name, size, str(batch)],
                capture_output=True,
                text=True,
                check=True,
            )
            print(
                f"| {size}, batch {batch} | {name} | {float(done.stdout.split()[-1]):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
