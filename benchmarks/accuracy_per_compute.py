"""Draw the test accuracy on CIFAR-10 against the training compute, and print it as a table.

    python benchmarks/accuracy_per_compute.py    # both from benchmarks/results, into which it draws

Ours are the result files in the folder of results: copies of result.json with the key pflops, named
RECIPE_seedN_HARDWARE_DATE.json, where RECIPE contains cifar10 or begins with conv_vit; one
with conv_vit is a hybrid. Seeds of one recipe on one hardware become one point. Other points, and
how their compute was counted, are in cifar10_accuracy_per_compute.yaml.
"""

import argparse
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import yaml

# Before pyplot is imported, which would look for a screen
matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

# The script is started by its path, and the repository is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.label_placement import place_labels
from benchmarks.reporting import table_header, table_row
from vit.errors import DataError, run_command
from vit.files import read_json

RESULTS = Path(__file__).parent / "results"
STORED = "cifar10_accuracy_per_compute.yaml"
# A kind of network: its marker and color. Shapes differ too, for who can't tell the colors apart
KINDS = {
    "plain ViT": ("o", "#0b62c4"),
    "hybrid": ("s", "#c4500b"),
    "convolutional": ("^", "#57606a"),
}
MARKER_POINTS = 8
DOTS_PER_INCH = 110
COLUMNS = ("run", "kind", "test top-1", "PFLOPs", "how it was counted")
# Without a seed, where the recipe's name ends and the hardware's begins can't be told
NAME = re.compile(
    r"(?P<recipe>.+?)(_seed(?P<seed>\d+)_(?P<hardware>.+?))?(_(?P<date>\d{4}-\d\d-\d\d))?"
)
# In the chart a run has the name of the recipe that makes it today
RECIPES = {
    "cifar10_fast_v2": "cifar10_fast",
    "cifar10_fast_v2_without_weight_decay": "cifar10_fast, no weight decay",
    "conv_vit_mini4": "cifar10_fast_conv",
    "conv_vit_mini4_without_weight_decay": "cifar10_fast_conv, no weight decay",
    "conv_vit_medium4": "cifar10_medium_conv",
    "conv_vit_large4": "cifar10_large_conv",
    "conv_vit_medium4_without_weight_decay": "cifar10_medium_conv, no weight decay",
}
CIFAR10 = re.compile(r"conv_vit(?!.*cifar100)|.*cifar10(?!\d)")


@dataclass(frozen=True)
class Point:
    """A recipe's place in the chart.

    top1s: a fraction for each seed; sources: URLs, or paths from the folder of benchmarks.
    """

    name: str
    kind: str
    pflops: float
    top1s: Sequence[float]
    how: str
    sources: Sequence[str]
    ours: bool = False
    hardware: str | None = None

    @property
    def top1(self) -> float:
        return statistics.fmean(self.top1s)


@dataclass
class Seeds:
    """The result files of one recipe on one hardware: {seed: its file}, and what they hold."""

    files: dict[str | None, Path] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)


def measured_points(folder: Path) -> list[Point]:
    """Read the result files of a folder; others in it are passed over.

    Raises DataError where two files hold the same seed.
    """
    groups: dict[tuple[str, str | None], Seeds] = defaultdict(Seeds)
    for file in sorted(folder.glob("*.json")):
        name, result = NAME.fullmatch(file.stem), read_json(file)
        if not CIFAR10.match(name["recipe"]):
            continue
        # Older runs have no pflops, unfinished ones no test accuracy
        if result.get("test_top1") is None or result.get("pflops") is None:
            continue
        seeds = groups[name["recipe"], name["hardware"]]
        if name["seed"] in seeds.files:
            raise DataError(
                f"{file} and {seeds.files[name['seed']].name} are the same seed of one recipe; "
                "move the older one out of the folder, or give its recipe another name"
            )
        seeds.files[name["seed"]] = file
        seeds.results.append(result)
    return [point_of_seeds(*key, seeds) for key, seeds in groups.items()]


def points_of(folder: Path) -> list[Point]:
    """Read all points of a folder of results, the cheapest first. Raises DataError."""
    points = [*measured_points(folder), *stored_points(folder / STORED)]
    return sorted(points, key=lambda point: point.pflops)


def point_of_seeds(recipe: str, hardware: str | None, seeds: Seeds) -> Point:
    count = len(seeds.files)
    return Point(
        name=RECIPES.get(recipe, recipe),
        kind="hybrid" if "conv_vit" in recipe else "plain ViT",
        pflops=statistics.fmean(result["pflops"] for result in seeds.results),
        top1s=[result["test_top1"] for result in seeds.results],
        how=f"by the run itself; {count} {'seed' if count == 1 else 'seeds'}",
        sources=[f"{file.parent.name}/{file.name}" for file in seeds.files.values()],
        ours=True,
        hardware=hardware,
    )


def stored_points(file: Path) -> list[Point]:
    """Read the points whose compute is counted from a stated configuration. Raises DataError."""
    if not file.is_file():
        raise DataError(f"{file}: no such file; --results names the folder that has it")
    return [
        Point(
            name=entry["name"],
            kind=entry["kind"],
            pflops=pflops_of(entry["passes"]),
            top1s=[entry["test_top1"]],
            how=f"{describe_passes(entry['passes'])}; {entry['how']}",
            sources=[entry["source"]],
            ours=entry.get("ours", False),
            hardware=entry.get("hardware"),
        )
        for entry in yaml.safe_load(file.read_text(encoding="utf-8"))
    ]


def flops_per_multiply_add(one_pass: dict[str, Any]) -> int:
    """2 forward, and 4 backward where gradients are computed."""
    return 6 if one_pass.get("backward", True) else 2


def pflops_of(passes: list[dict[str, Any]]) -> float:
    """Add up the compute of passes through networks, in 10^15 FLOPs."""
    flops = sum(flops_per_multiply_add(p) * p["multiply_adds"] * p["images"] for p in passes)
    return flops / 1e15


def describe_passes(passes: list[dict[str, Any]]) -> str:
    """Write out the sum, such as "6 x 187.7 M x 14.99 M images"."""
    return " + ".join(
        f"{flops_per_multiply_add(p)} x {p['multiply_adds'] / 1e6:.4g} M "
        f"x {p['images'] / 1e6:.4g} M images"
        for p in passes
    )


def describe_top1(point: Point) -> str:
    """Return the mean in per cent, and the lowest and the highest of several seeds."""
    if len(point.top1s) == 1:
        # As many digits as were published
        return f"{100 * point.top1:.4g} %"
    return f"{point.top1:.2%} ({min(point.top1s):.2%} to {max(point.top1s):.2%})".replace("%", " %")


def table_of(points: list[Point]) -> str:
    """Return the points as a Markdown table."""
    lines = [table_header(*COLUMNS)]
    for point in points:
        first, *others = point.sources
        name = f"`{point.name}`" if point.ours else point.name
        links = [f"[{name}]({first})", *(f"[{n}]({url})" for n, url in enumerate(others, start=2))]
        if point.hardware:
            links.append(point.hardware.replace("_", " "))
        accuracy = describe_top1(point)
        cells = (", ".join(links), point.kind, accuracy, f"{point.pflops:.3g}", point.how)
        lines.append(table_row(*cells))
    return "\n".join(lines)


def draw(points: list[Point]) -> Figure:
    """Draw the points over their compute, with whiskers from the lowest to the highest seed."""
    figure, axis = plt.subplots(figsize=(9, 5), dpi=DOTS_PER_INCH)
    axis.set_xscale("log")
    for point in points:
        draw_point(axis, point)
    # Room for the labels of the outermost points
    axis.margins(x=0.12, y=0.12)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda pflops, _: f"{pflops:g}"))
    axis.set_xlabel("training compute in PFLOPs (6 x multiply-adds x images seen), log scale")
    axis.set_ylabel("CIFAR-10 test top-1, %")
    axis.grid(alpha=0.3)
    draw_legend(axis, points)

    # Texts are laid out in pixels, so after everything that moves the axes
    figure.tight_layout()
    labels = [(label_of(point, points), point.pflops, 100 * point.top1) for point in points]
    place_labels(axis, labels, [box_of(axis, point) for point in points])
    return figure


def draw_point(axis: Axes, point: Point) -> None:
    marker, color = KINDS[point.kind]
    top1 = 100 * point.top1
    limits = [[top1 - 100 * min(point.top1s)], [100 * max(point.top1s) - top1]]
    axis.errorbar(
        [point.pflops],
        [top1],
        yerr=limits if len(point.top1s) > 1 else None,
        fmt=marker,
        color=color,
        markerfacecolor=color if point.ours else "white",
        markersize=MARKER_POINTS,
        capsize=5,
    )


def draw_legend(axis: Axes, points: list[Point]) -> None:
    """Say above the axes, where no point can lie, what markers mean."""
    present = {point.kind for point in points}
    entries = [(kind, *KINDS[kind], None) for kind in KINDS if kind in present]
    entries += [
        ("this project", "o", "black", "black"),
        ("published by others", "o", "black", "white"),
    ]
    handles = [
        Line2D(
            [], [], linestyle="", label=label, marker=marker, color=color, markerfacecolor=inside
        )
        for label, marker, color, inside in entries
    ]
    axis.legend(
        handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5, frameon=False
    )


def label_of(point: Point, points: list[Point]) -> str:
    """Return the run's name, with its hardware where it was run on more than one."""
    namesakes = [other for other in points if other.name == point.name]
    name = point.name.replace(", ", "\n")
    if len(namesakes) == 1 or point.hardware is None:
        return name
    return f"{name}\n{point.hardware.replace('_', ' ')}"


def box_of(axis: Axes, point: Point) -> Bbox:
    """Return the pixels that the point's marker and whiskers take."""
    lowest, highest = (100 * limit(point.top1s) for limit in (min, max))
    ends = axis.transData.transform([(point.pflops, lowest), (point.pflops, highest)])
    return Bbox(ends).padded(MARKER_POINTS / 2 * axis.figure.dpi / 72)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of results")
    parser.add_argument("--out", type=Path, help="the picture; by default a PNG in that folder")
    arguments = parser.parse_args()

    points = points_of(arguments.results)
    print(table_of(points))
    out = arguments.out or (arguments.results / STORED).with_suffix(".png")
    draw(points).savefig(out, dpi=DOTS_PER_INCH)


if __name__ == "__main__":
    sys.exit(run_command("accuracy_per_compute.py", main))
