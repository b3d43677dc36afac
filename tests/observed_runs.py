"""Small runs of train.py and evaluate.py in this process, and all that can be seen of them.

What only repeats the configuration (config.yaml, the card, the header of a checkpoint, the pages of
settings in TensorBoard) is not looked at: a key that nobody reads would show there too.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import evaluate as evaluate_script
import train as train_script
from vit.checkpoints.file import read_checkpoint
from vit.checkpoints.run import RunCheckpoints
from vit.config.command_line import prepare_arguments
from vit.config.config import CONF, from_composed, register, validate
from vit.config.resume import command_line_changes
from vit.config.settings import check_settings
from vit.errors import Stopped, TrainingFailed, UserError
from vit.model.vision_transformer import Block
from vit.runs.folder import RunFolder
from vit.runtime.signals import StopSignal
from vit.training.loop import Trainer

Observed = dict[str, Any]

# Of the screen, the lines without times and speeds
LINES = (
    "model ",
    "data ",
    "train ",
    "val ",
    "test ",
    "run ",
    "note ",
    "warning",
    "start ",
    "resuming",
)
# Of evaluation.json and result.json, what differs each time
VOLATILE = ("seconds", "images_per_second", "product_rate_share", "checkpoint")

register()


def compose_script(name: str, overrides: list[str]) -> DictConfig:
    """What Hydra makes of `NAME.py overrides…`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides)


class NotedBoard:
    """Stands in for TensorBoard: notes what is drawn and when, and draws nothing."""

    active = True

    def __init__(self, notes: set[tuple[str, int]]):
        self.notes = notes

    def note(self, tag: str, content: Any, step: int) -> None:
        self.notes.add((tag, step))

    scalar = histogram = image = note

    def text(self, tag: str, markdown: str, step: int) -> None:
        if tag != "configuration":
            self.note(tag, markdown, step)

    def training_images(self, images: torch.Tensor, labels: list[str], step: int) -> None:
        self.note("training images", images, step)

    def hyperparameters(self, *settings: Any) -> None:
        pass

    def close(self) -> None:
        pass


@contextlib.contextmanager
def noted_machine(patch: pytest.MonkeyPatch) -> Iterator[Observed]:
    """Note what the group `runtime` controls, and put it back afterwards."""
    machine: Observed = {"workers": set(), "compiled": 0, "block passes": 0}

    def compile_nothing(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        machine["compiled"] += 1
        return model

    decode, forward, fit = data_loader(), Block.forward, Trainer.fit

    def noted_decode(dataset: Any, batches: Any, workers: int, device: Any) -> Any:
        machine["workers"].add(workers)
        return decode(dataset, batches, 0, device)

    def noted_forward(self: Block, *arguments: Any) -> Any:
        machine["block passes"] += 1
        return forward(self, *arguments)

    def noted_fit(self: Trainer) -> None:
        note_torch(machine)
        fit(self)

    patch.setattr(torch, "compile", compile_nothing)
    patch.setattr("vit.training.batches.decode_batches", noted_decode)
    patch.setattr("vit.data.loader.decode_batches", noted_decode)
    patch.setattr(Block, "forward", noted_forward)
    patch.setattr(Trainer, "fit", noted_fit)
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        yield machine
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def data_loader() -> Callable[..., Any]:
    from vit.data.loader import decode_batches

    return decode_batches


def note_torch(machine: Observed) -> None:
    machine["threads"] = torch.get_num_threads()
    machine["deterministic"] = torch.are_deterministic_algorithms_enabled()


def observe_training(folder: Path, overrides: list[str], earlier: Path | None = None) -> Observed:
    """Run `train.py overrides…` in a folder, and return all that can be seen of it.

    earlier: a run whose files are in the folder before. A mistake of the user's gives {"error"}.
    """
    if earlier is not None:
        shutil.copytree(earlier, folder)
    with pytest.MonkeyPatch.context() as patch, noted_machine(patch) as machine:
        board: set[tuple[str, int]] = set()
        saves: list[tuple[str, int]] = []
        without_pictures(patch)
        patch.setattr("vit.training.start.TensorBoard", lambda *arguments: NotedBoard(board))
        for kind in ("last", "best"):
            patch.setattr(RunCheckpoints, f"save_{kind}", noted_save(kind, saves))
        screen = io.StringIO()
        try:
            with contextlib.redirect_stdout(screen):
                processes = train(folder, overrides)
        except (UserError, TrainingFailed, Stopped) as error:
            return {"error": f"{type(error).__name__}: {error}"}

    lines = screen.getvalue().splitlines()
    seen: Observed = {
        "screen": [line for line in lines if line.startswith(LINES)],
        "processes": processes,
        "machine": machine,
        "TensorBoard": board,
        "saves": saves,
    }
    if folder.exists():
        seen |= files_of_run(folder)
    else:
        # explain=true leaves no folder, and all that it tells is on the screen
        seen["explanation"] = len(lines)
    return seen


def train(folder: Path, overrides: list[str]) -> int:
    """The body of train.py's main() for one process; the number of processes it would start."""
    # Hydra's own groups are not composed: a search needs a package that need not be there
    given = dict(override.split("=", 1) for override in overrides)
    choices = {"search": given.pop("search", None)}
    overrides = [f"{key}={value}" for key, value in given.items()]
    composed = compose_script("train", overrides)
    job = SimpleNamespace(runtime=SimpleNamespace(choices=choices))
    count = train_script.requested_processes(composed, folder, overrides)

    with RunFolder(folder, overrides, writes=True).outcome() as run:
        train_script.refuse_settings_of_sweeps(composed, job)
        config, warnings = train_script.read_config(composed, run)
        validate(config)
        if config.explain:
            train_script.explain(config, run, StopSignal())
        else:
            train_script.guarded_train(config, run, StopSignal(), warnings)
    return count


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    """Leave out what takes seconds and repeats the configuration or is drawn for people alone."""
    for figure in ("confusion_figure", "confused_table", "prediction_figure", "attention_figure"):
        patch.setattr(f"vit.training.validation_board.{figure}", lambda *arguments: None)
    patch.setattr("vit.training.start.product_rate", lambda *arguments: 1e12)
    patch.setattr("vit.training.explanation.product_rate", lambda *arguments: 1e12)
    patch.setattr("vit.training.reporting.write_card", lambda *arguments: None)


def noted_save(kind: str, saves: list[tuple[str, int]]) -> Callable[..., None]:
    save = getattr(RunCheckpoints, f"save_{kind}")

    def noted(self: RunCheckpoints, state: Any) -> None:
        saves.append((kind, state.progress.step))
        save(self, state)

    return noted


def files_of_run(folder: Path) -> Observed:
    """What is in a run folder, but for the configuration itself."""
    result = json.loads((folder / "result.json").read_text())
    seen: Observed = {
        "files": sorted(path.name for path in folder.rglob("*")),
        "metrics": (folder / "metrics.jsonl").read_text(),
        "result": {key: value for key, value in result.items() if key not in VOLATILE},
    }
    for name in ("best", "last"):
        tensors, header = read_checkpoint(folder / "checkpoints" / f"{name}.safetensors")
        seen[name] = {key: digest(tensor) for key, tensor in tensors.items()}
        seen[f"preprocessing of {name}"] = header["preprocessing"]
        seen[f"precision of {name}"] = header["precision"]
    return seen


def digest(tensor: torch.Tensor) -> int:
    return hash(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def observe_evaluation(folder: Path, overrides: list[str]) -> Observed:
    """Run `evaluate.py overrides…`, writing to a folder, and return all that can be seen of it."""
    out = [] if any(item.startswith("out=") for item in overrides) else [f"out='{folder}'"]
    prepared = prepare_arguments([*overrides, *out])
    with pytest.MonkeyPatch.context() as patch, noted_machine(patch) as machine:
        batch_sizes: list[int] = []
        note_batch_sizes(patch, batch_sizes)
        patch.setattr("vit.report.page.write_report", lambda *arguments: "the page")
        screen = io.StringIO()
        try:
            composed = compose_script("evaluate", prepared)
            settings = from_composed(composed)
            changes = command_line_changes(composed, prepared)
            check_settings(settings)
            evaluate_script.check_source(settings, changes)
            with contextlib.redirect_stdout(screen):
                evaluate_script.measure(settings, changes)
        except UserError as error:
            return {"error": f"{type(error).__name__}: {error}"}
        note_torch(machine)

    written = [Path(str(path)) for path in folder.parent.rglob("evaluation*.json")]
    numbers = {path.relative_to(folder.parent): json.loads(path.read_text()) for path in written}
    return {
        "numbers": {
            path: {key: value for key, value in row.items() if key not in VOLATILE}
            for path, row in numbers.items()
        },
        "batch sizes": batch_sizes,
        "machine": machine,
        "screen": screen.getvalue(),
        "files": sorted(str(path.relative_to(folder.parent)) for path in folder.parent.rglob("*")),
    }


def note_batch_sizes(patch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    from vit.evaluation import restore

    pixels = restore.evaluation_pixels

    def noted(images: Any, batch_size: int, *others: Any) -> Any:
        sizes.append(batch_size)
        return pixels(images, batch_size, *others)

    patch.setattr(restore, "evaluation_pixels", noted)
