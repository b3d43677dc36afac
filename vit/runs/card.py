"""A run's card, card.md: what was trained and how, what it reached and cost, how to repeat it."""

import itertools
import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vit.evaluation.accuracy import wilson_interval
from vit.files import read_json, read_jsonl, write_text
from vit.runs.selection import CRITERIA, OF_CLASSES, describe_value
from vit.runs.timing import Cost
from vit.text import format_duration, markdown_table

ROOT = Path(__file__).parents[2]
BARS = "▁▂▃▄▅▆▇█"
# Characters of a curve
COLUMNS = 48
# How the first line of a config.yaml starts, which is the command that started the run
FIRST_LINE = "# python train.py "
RECIPE = ("augment", "optimizer", "schedule", "train")
# Settings of the recipe's groups that change no weight, or are elsewhere on the card
NOT_OF_RECIPE = (
    "train.epochs",
    "train.steps",
    "train.eval_every",
    "train.attention_every",
    "train.log_every",
    "train.save_every",
    "optimizer.name",
    "schedule.name",
)
Section = dict[str, Any]


def write_card(
    folder: Path,
    settings: dict[str, Any],
    command: str,
    data: dict[str, Any],
    cost: Cost,
    device: str,
    teacher: Section | None = None,
) -> None:
    """Write card.md into the folder of a finished run.

    settings: the configuration as nested dictionaries; command: see repeat_command; data: the
    number of classes and descriptions of the splits; cost: of one image; device: a
    description of the hardware and the precision; teacher: what is said of it, None without one.
    Raises OSError where the disk can't be written to.
    """
    # The numbers come from the run's files, so that the card can't say anything else than they do
    result = read_json(folder / "result.json")
    metrics = read_jsonl(folder / "metrics.jsonl")
    timing = read_jsonl(folder / "timing.jsonl")

    model_name, data_name = settings["model"]["name"], settings["data"]["name"]
    sections = {
        "Result": result_section(result, metrics),
        "Model": model_section(settings["model"]),
        "Data": {"name": data_name, **data},
        "Recipe": recipe_section(settings, result),
        **({} if teacher is None else {"Teacher": teacher}),
        "Cost": cost_section(result, timing, cost, device),
        "Versions": versions_section(),
    }

    lines = [f"# {model_name} on {data_name}: {result['test_top1']:.2%} test top-1"]
    for title, section in sections.items():
        # Markdown has no table without a header, so it is empty
        rows = [["", ""], *([name, str(value)] for name, value in section.items())]
        lines += ["", f"## {title}", "", markdown_table(rows)]

    evaluate = shlex.quote(f"checkpoint={folder}/checkpoints/best.safetensors")
    lines += ["", "## Curves", "", "```text", *curves(metrics), "```"]
    lines += [
        "",
        "## To repeat it",
        "",
        "```bash",
        command,
        f"python evaluate.py {evaluate}",
        "```",
    ]
    write_text(folder / "card.md", "\n".join(lines) + "\n")


def result_section(result: dict[str, Any], metrics: list[dict[str, Any]]) -> Section:
    # Sizes of the splits, since an accuracy means little without one
    images = {row["split"]: int(row["n"]) for row in metrics if "n" in row}
    test = accuracy_with_interval(result["test_top1"], images["test"])
    section = {"test top-1": f"{test}, read once, at the end; loss {result['test_loss']:.4f}"}
    if result["val_top1"] is not None:
        val = accuracy_with_interval(result["val_top1"], images["val"])
        step, best_in = result["best_step"], ""
        if result["select"] != "top1":
            value = result[f"val_{result['select']}"]
            best_in = f" in {CRITERIA[result['select']]}, {describe_value(result['select'], value)}"
        text = f"{val}, after step {step:,}, selected for being the best{best_in}"
        section["validation top-1"] = text
    # Classes of equal size have a balanced accuracy that says nothing new
    if any("balanced_top1" in row for row in metrics):
        told = {name: describe_value(name, result[f"test_{name}"]) for name in OF_CLASSES}
        section |= {f"test {CRITERIA[name]}": text for name, text in told.items()}
    return section


def model_section(model: dict[str, Any]) -> Section:
    layers, width, heads = model["num_layers"], model["hidden_size"], model["num_heads"]
    return {
        "name": model["name"],
        "size": f"{layers} layers of width {width}, {heads} heads",
        "input": f"{model['image_size']} px in patches of {model['patch_size']}",
    }


def recipe_section(settings: dict[str, Any], result: dict[str, Any]) -> Section:
    section = {
        "length": f"{result['steps']:,} steps; {result['reason']}",
        "seed": settings["seed"],
        "start": settings.get("pretrained") or "random weights",
    }
    for group in RECIPE:
        title = f"{group} {settings[group].get('name', '')}".strip()
        section[title] = active_settings(settings, group)
    return section


def cost_section(
    result: dict[str, Any], timing: list[dict[str, Any]], cost: Cost, device: str
) -> Section:
    peak = max((row["memory_bytes"] for row in timing), default=0)
    forward, training = 2 * cost.macs / 1e9, cost.nominal_flops / 1e9
    return {
        "time": format_duration(result["seconds"]),
        "speed": f"{result['images_per_second']:g} images/s, pauses included",
        "training compute": f"{result['pflops']:.3g} PFLOPs, {result['product_rate_share']:.0%} of "
        "what the device could multiply in that time",
        "device": device,
        "parameters": f"{result['params']:,}",
        "GFLOPs an image": f"{forward:.3g} forward, {training:.3g} in training",
        "peak memory": f"{peak / 2**30:.2f} GiB",
    }


def versions_section() -> Section:
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "torchvision": version("torchvision"),
        "this project": project_version(),
    }


def accuracy_with_interval(accuracy: float, n: int) -> str:
    low, high = wilson_interval(accuracy, n)
    return f"{accuracy:.2%} ({low:.2%} to {high:.2%}) of {n:,} images"


def active_settings(settings: dict[str, Any], group: str) -> str:
    """Describe the settings of a group that do something, in one line."""
    return ", ".join(
        f"{key} {value}"
        for key, value in settings[group].items()
        if value not in (None, False, "none", []) and f"{group}.{key}" not in NOT_OF_RECIPE
    )


def curves(metrics: list[dict[str, Any]]) -> list[str]:
    """Draw a line for each of loss and top-1 on train and val, where there are numbers."""
    lines = []
    for key in ("loss", "top1"):
        for split in ("train", "val"):
            # No top-1 on train where images are mixed, none on val where nothing is held out
            values = [row[key] for row in metrics if row["split"] == split and key in row]
            if values:
                lines.append(curve(f"{split} {key}", values))
    return lines


def curve(name: str, values: Sequence[float]) -> str:
    """Draw numbers over the run as one line of bars, from their lowest to their highest."""
    # Where there are more numbers than columns, a column shows the mean of its numbers
    count = min(COLUMNS, len(values))
    edges = [round(number * len(values) / count) for number in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]

    # Eight heights of equal range; the highest number itself would be in a ninth
    lowest = min(means)
    span = max(means) - lowest
    heights = [int(len(BARS) * (mean - lowest) / span) if span else 0 for mean in means]
    bars = "".join(BARS[min(len(BARS) - 1, height)] for height in heights)
    return f"{name:10}  {bars:{COLUMNS}}  {values[0]:.4g} to {values[-1]:.4g}"


def repeat_command(config_file: Path, overrides: Sequence[str], seed: int) -> str:
    """Return the command that repeats the run from its start: with its seed, without `resume`.

    Where there is a config.yaml already, its first line holds the command that started the run, of
    which `overrides` change a part.
    """
    first_line = ""
    if config_file.exists():
        first_line = config_file.read_text(encoding="utf-8").partition("\n")[0]
    began_with = []
    if first_line.startswith(FIRST_LINE):
        began_with = shlex.split(first_line.removeprefix(FIRST_LINE))

    # Later ones win, as on the command line; a line break would end the comment in config.yaml
    given = {}
    for override in [*began_with, *overrides]:
        given[override.partition("=")[0]] = override.replace("\n", " ")
    given.setdefault("seed", f"seed={seed}")
    kept = [given[key] for key in given if key not in ("resume", "resume_changed")]
    return shlex.join(["python", "train.py", *kept])


def project_version() -> str:
    """Name the git commit of this code, and whether its files have changes.

    Without git, or where this is no checkout, it says so: that is no reason to lose a card.
    """
    try:
        top = git("rev-parse", "--show-toplevel")
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "-uno")
    except (OSError, subprocess.SubprocessError):
        return "no git checkout"
    # The code was copied into another project, whose commit says nothing about it
    if not Path(top).samefile(ROOT):
        return "no git checkout"
    suffix = ", with changes that are not committed" if changes else ""
    return f"commit {commit[:12]}{suffix}"


def git(*arguments: str) -> str:
    """Return what git prints. Raises OSError and subprocess.SubprocessError where it fails."""
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()
