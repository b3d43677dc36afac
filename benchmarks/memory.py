"""Peak memory of training on a CPU: two steps of every project, in a process each.

python benchmarks/memory.py
"""

import argparse
import subprocess
import sys
from datetime import date
from pathlib import Path

# The script is started by its path, and the repository is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.reporting import table_header, table_row

# (size, images of a batch)
CASES = [("vit_b16", 8), ("vit_s4", 128)]
PROJECTS = ("ours", "timm", "huggingface", "torchvision", "vit_pytorch")


def peak_gib(project: str, size: str, batch_size: int) -> float:
    """Return the peak memory of this process in GiB, after two steps of training."""
    # Late: on Linux a process's peak starts at that of the one it was started by, so the latter
    # must not import torch
    import torch

    from benchmarks.contestants import Contestant, make_step
    from vit.runtime.device import peak_memory
    from vit.runtime.precision import Precision

    device = torch.device("cpu")
    contestant = Contestant(project, compiled=False)
    step = make_step(contestant, size, batch_size, Precision("bf16", device), training=True)
    # The first step allocates the optimizer's state after its backward pass, the second has both
    step()
    step()
    return peak_memory(device) / 2**30


def peak_gib_of_process(project: str, size: str, batch_size: int) -> float:
    """Return peak_gib() of a new process."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", project, size, str(batch_size)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    # A library may print something before it
    return float(finished.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--one",
        nargs=3,
        metavar=("PROJECT", "SIZE", "BATCH"),
        help="measure one in this process, and print its GiB alone",
    )
    arguments = parser.parse_args()
    if arguments.one:
        project, size, batch_size = arguments.one
        print(peak_gib(project, size, int(batch_size)))
        return

    print(f"{date.today()}, bf16\n\n{table_header('training', 'project', 'peak GiB')}")
    for size, batch_size in CASES:
        for project in PROJECTS:
            gib = peak_gib_of_process(project, size, batch_size)
            print(table_row(f"{size}, batch {batch_size}", project, f"{gib:.2f}"), flush=True)


if __name__ == "__main__":
    main()
