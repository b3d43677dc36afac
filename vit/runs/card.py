"""A run's card: one page, card.md, that says what was trained, how, what it reached, what it cost and how to repeat it."""

import itertools
import json
import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vit.evaluation.accuracy import wilson_interval
from vit.text import format_duration

ROOT = Path(__file__).parents[2]


BARS, COLUMNS = "▁▂▃▄▅▆▇█", 48


RECIPE = ("augment", "optimizer", "schedule", "train")


BEGINNING = "# python train.py "  # of a config.yaml


NO_RECIPE = (
    "train.epochs",
    "train.steps",
    "train.eval_every",
    "train.attention_every",
    "train.log_every",
    "train.save_every",
    "optimizer.name",
    "schedule.name",
)  # of those groups what changes no weight or is told elsewhere


def write_card(
    folder: Path,
    settings: dict[str, Any],
    command: str,
    data: dict[str, Any],
    macs: int,
    device: str,
) -> None:
    """Write card.md, in Markdown, into the folder of a finished run, from its result.json, metrics.jsonl and timing.jsonl.

    settings: the configuration, nested; command: see command_line; data: the classes' number and the splits in words;
    macs: of one image's forward pass; device: where and in what precision. Raises OSError where the disk takes no more.
    """
    result = json.loads((folder / "result.json").read_text())
    metrics, timing = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "timing.jsonl")
    )
    model, n = settings["model"], {row["split"]: int(row["n"]) for row in metrics if "n" in row}
    reached = {
        "test top-1": f"{told(result['test_top1'], n['test'])}, read once, at the end; loss {result['test_loss']:.4f}"
    }
    if result["val_top1"] is not None:
        reached["validation top-1"] = (
            f"{told(result['val_top1'], n['val'])}, the best one, after step "
            f"{result['best_step']:,}, and chosen for that"
        )
    sections = {
        "Result": reached,
        "Model": {
            "name": model["name"],
            "size": f"{model['num_layers']} layers of width {model['hidden_size']}, "
            f"{model['num_heads']} heads",
            "input": f"{model['image_size']} px in patches of {model['patch_size']}",
        },
        "Data": {"name": settings["data"]["name"], **data},
        "Recipe": {
            "length": f"{result['steps']:,} steps",
            "seed": settings["seed"],
            "start": settings.get("pretrained") or "random weights",
            **{
                f"{group} {settings[group].get('name', '')}".strip(): notable(settings, group)
                for group in RECIPE
            },
        },
        "Cost": {
            "time": format_duration(result["seconds"]),
            "speed": f"{result['images_per_second']:g} images/s, pauses included",
            "device": device,
            "parameters": f"{result['params']:,}",
            "GFLOPs an image": f"{2 * macs / 1e9:.3g} forward, {6 * macs / 1e9:.3g} in training",
            "peak memory": f"{max((row['memory_bytes'] for row in timing), default=0) / 2**30:.2f} GiB",
        },
        "Versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "torchvision": version("torchvision"),
            "this project": project_version(),
        },
    }
    curves = [
        curve(
            f"{split} {key}", [row[key] for row in metrics if row["split"] == split and key in row]
        )
        for key in ("loss", "top1")
        for split in ("train", "val")
    ]
    lines = [
        f"# {model['name']} on {settings['data']['name']}: {result['test_top1']:.2%} test top-1"
    ]
    for title, rows in sections.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {cell(value)} |" for name, value in rows.items()),
        ]
    lines += [
        "",
        "## Curves",
        "",
        "```text",
        *filter(None, curves),
        "```",
        "",
        "## To repeat it",
        "",
        "```bash",
        command,
        f"python evaluate.py {shlex.quote(f'checkpoint={folder}/checkpoints/best.safetensors')}",
        "```",
        "",
    ]
    (folder / "card.md").write_text("\n".join(lines), encoding="utf-8")


def told(accuracy: float, n: int) -> str:
    low, high = wilson_interval(accuracy, n)
    return f"{accuracy:.2%} ({low:.2%} to {high:.2%}) of {n:,} images"


def notable(settings: dict[str, Any], group: str) -> str:
    """The settings of a group that do something, in one line."""
    return ", ".join(
        f"{key} {value}"
        for key, value in settings[group].items()
        if value not in (None, False, "none", []) and f"{group}.{key}" not in NO_RECIPE
    )


def cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def curve(name: str, values: Sequence[float]) -> str:
    """Numbers over the course of the run as one line of bars, their lowest to their highest; means where they are many."""
    if not values:
        return ""
    count = min(COLUMNS, len(values))
    edges = [round(place * len(values) / count) for place in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    bars = "".join(
        BARS[min(7, int(8 * (mean - low) / span))] if span else BARS[0] for mean in means
    )
    return f"{name:10}  {bars:{COLUMNS}}  {values[0]:.4g} to {values[-1]:.4g}"


def command_line(config_file: Path, overrides: Sequence[str], seed: int) -> str:
    """The command that begins the same run anew: with its seed and without what resumes one. Where a config.yaml stands
    already its first line tells the command that began the run, of which `overrides` change some."""
    before = config_file.read_text().partition("\n")[0] if config_file.exists() else ""
    known = shlex.split(before.removeprefix(BEGINNING)) if before.startswith(BEGINNING) else []
    told = {
        override.partition("=")[0]: override.replace("\n", " ") for override in [*known, *overrides]
    }
    told.setdefault("seed", f"seed={seed}")
    return shlex.join(
        [
            "python",
            "train.py",
            *(told[key] for key in told if key not in ("resume", "resume_changed")),
        ]
    )


def project_version() -> str:
    """The git commit of this code and whether the tree was changed, where this is a checkout and git answers."""
    try:
        top, commit, changes = (
            subprocess.run(
                ["git", *words.split()],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.strip()
            for words in ("rev-parse --show-toplevel", "rev-parse HEAD", "status --porcelain -uno")
        )
    except (OSError, subprocess.SubprocessError):
        return "no git checkout"
    if not Path(top).samefile(ROOT):  # the code was copied into another project
        return "no git checkout"
    return f"commit {commit[:12]}{', with changes that are not committed' if changes else ''}"
