"""Write an HTML page to look into a model with: which patch attends to which, what each head does.

    python -m vit.explore RUN/checkpoints/best.safetensors photos/ --out explorer.html

The page loads nothing, so it opens from the disk and can be passed on. `vit.report.explorer`
computes what it holds; vit/explore.html shows it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vit.errors import CheckpointError, ConfigError, run_command, writing_to
from vit.files import check_writable, write_text

# torch takes seconds to import, and --help and a mistyped command should answer at once. So torch,
# and the modules of vit that import it, are imported inside the functions that need them.
if TYPE_CHECKING:
    from vit.checkpoints.snapshots import Snapshot
    from vit.model.vision_transformer import VisionTransformer
    from vit.report.explorer import Example

TEMPLATE = Path(__file__).with_suffix(".html")

# Images on the page without --limit, if they fit into COMFORTABLE_BYTES
DEFAULT_IMAGES = 8

# The size of a page that a browser opens at once, and of one that it can just be asked to open
COMFORTABLE_BYTES = 25e6
MAX_BYTES = 60e6


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m vit.explore",
        description="Write an HTML page to look into a model with: attention of every patch, "
        "layer and head, rollout, and predictions without a head.",
    )
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/best.safetensors, or RUN")
    parser.add_argument(
        "images",
        type=Path,
        nargs="*",
        metavar="IMAGES",
        help="image files, or folders of them (default: test images of the checkpoint's data set)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="file for the page, such as explorer.html"
    )
    parser.add_argument(
        "--also",
        type=Path,
        nargs="+",
        default=[],
        metavar="CHECKPOINT",
        help="more checkpoints of the same run (best, last, previous, …), to see the maps develop",
    )
    parser.add_argument(
        "--limit",
        type=int,
        help=f"at most this many images (default: {DEFAULT_IMAGES}, or fewer for a large model)",
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", help="only these layers, counted from 0 (default: all)"
    )
    parser.add_argument("--data-root", help="where the data set is now, if it has moved")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return parser.parse_intermixed_args(arguments)  # IMAGES may follow --out


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.limit is not None and options.limit <= 0:
        raise ConfigError(f"--limit must be a positive number, got {options.limit}")
    # Judged by the extension, so that a checkpoint is never overwritten by mistake
    if options.out.is_dir() or options.out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {options.out}: give the name of a file that ends in .html")
    if options.images and options.data_root is not None:
        raise ConfigError("--data-root does nothing beside IMAGES, which are shown; leave it out")
    explore(options)


def explore(options: argparse.Namespace) -> None:
    from vit.data.image_files import find_image_files
    from vit.report.explorer import build_page, bytes_per_image
    from vit.runtime.device import start_device
    from vit.runtime.memory import memory_errors

    device = start_device(options.device, "--device")
    paths = find_image_files(options.images, print)
    snapshots = load_snapshots([options.checkpoint, *options.also])
    model = snapshots[0].model
    layers = choose_layers(options.layers, len(model.encoder.blocks))

    requested = options.limit
    if requested is not None and paths:
        requested = min(requested, len(paths))
    count = choose_count(requested, bytes_per_image(snapshots, layers), len(snapshots))
    check_writable(options.out)
    if len(paths) > count:
        print(f"the first {count} of {len(paths)} images; more with --limit")

    if paths:
        examples = examples_from_files(paths[:count], model)
    else:
        examples = examples_from_data(options.checkpoint, options.data_root, count)
    template = TEMPLATE.read_text("utf-8")
    with memory_errors("try --device cpu"):
        page = build_page(template, snapshots, examples, layers, device)
    with writing_to(f"--out {options.out}"):
        write_text(options.out, page)

    steps = f", {len(snapshots)} checkpoints" if len(snapshots) > 1 else ""
    size = len(page.encode()) / 1e6
    print(f"{options.out}: {len(examples)} images{steps}, {size:.1f} MB; open it in a browser")


def load_snapshots(paths: Sequence[Path]) -> "list[Snapshot]":
    """Load checkpoints of one run and sort them by their steps.

    One that repeats another is left out: a run's best and last weights are often the same. Raises
    CheckpointError if a checkpoint can't be read, is of another model than the first, or is one of
    several and doesn't record its step.
    """
    from vit.checkpoints.snapshots import check_same_architecture, load_snapshot

    snapshots: list[Snapshot] = []
    for path in paths:
        snapshot = load_snapshot(path)
        if snapshot.step is None and len(paths) > 1:
            raise CheckpointError(
                f"{path}: its header has no training step to sort it by; leave it out of --also"
            )
        if snapshots:
            check_same_architecture(snapshot, snapshots[0])
        # Best and last of a short run are often the same: shown twice they would mislead
        twin = next((other for other in snapshots if snapshot.equals(other)), None)
        if twin is None:
            snapshots.append(snapshot)
        else:
            print(f"{path}: left out, the same weights as {twin.path}")
    return sorted(snapshots, key=lambda snapshot: snapshot.step or 0)


def choose_layers(requested: Sequence[int] | None, depth: int) -> list[int]:
    """The requested layers in their order, or all. Raises ConfigError if there is no such layer."""
    layers = sorted(set(requested or range(depth)))
    if layers[0] < 0 or layers[-1] >= depth:
        given = " ".join(map(str, requested or []))
        raise ConfigError(f"--layers {given}: the model has layers 0 to {depth - 1}")
    return layers


def choose_count(requested: int | None, image_bytes: int, num_snapshots: int) -> int:
    """How many images the page takes: as many as requested, or as many as open comfortably.

    image_bytes: how many bytes each adds to the page. Raises ConfigError where the page would be
    larger than MAX_BYTES.
    """
    comfortable = min(DEFAULT_IMAGES, int(COMFORTABLE_BYTES / image_bytes))
    count = requested or max(1, comfortable)
    if count * image_bytes <= MAX_BYTES:
        return count

    largest = int(MAX_BYTES / image_bytes)
    advice = f"--limit {largest}" if largest else "fewer --layers"
    if num_snapshots > 1:
        advice += " or fewer --also"
    raise ConfigError(
        f"the page would take {count * image_bytes / 1e6:.0f} MB, more than {MAX_BYTES / 1e6:.0f}, "
        f"{count} image{'s' * (count > 1)} at {image_bytes / 1e6:.1f} MB; give {advice}"
    )


def examples_from_files(paths: Sequence[Path], model: "VisionTransformer") -> "list[Example]":
    """Images in files. One in a folder with a class's name is taken to be of that class.

    Raises DataError.
    """
    from vit.report.explorer import Example

    examples = []
    for path in paths:
        folder = path.absolute().parent.name
        label = model.classes.index(folder) if folder in model.classes else None
        examples.append(Example(path.name, model.preprocessing(path), label))
    return examples


def examples_from_data(checkpoint: Path, data_root: str | None, count: int) -> "list[Example]":
    """Test images of the checkpoint's data set, spread evenly over its classes.

    Raises what `vit.evaluation.restore.restore` does.
    """
    import torch

    from vit.data.loader import evaluation_batches
    from vit.data.splits import sample_evenly
    from vit.evaluation.restore import restore
    from vit.report.explorer import Example

    cpu = torch.device("cpu")
    changes = {} if data_root is None else {"data.root": data_root}
    restored = restore(checkpoint, changes, cpu)
    test = restored.data.test
    indices = sample_evenly(test.labels, count)
    preprocessing = restored.model.preprocessing
    batches = evaluation_batches(test.subset(indices), count, preprocessing, 0, cpu)
    images, labels = next(batches)
    return [
        Example(f"{test.title}, number {index}", image, label)
        for index, image, label in zip(indices.tolist(), images, labels.tolist(), strict=True)
    ]


if __name__ == "__main__":
    sys.exit(run_command("vit.explore", main))
