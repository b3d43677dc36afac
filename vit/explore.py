"""One HTML page to look into a model with: which patch attends to which, and what each head is for.

    python -m vit.explore outputs/…/checkpoints/best.safetensors my_pictures/ --out explorer.html

The page holds everything in itself and loads nothing, so it opens from the disk and can be passed on. Its numbers come from
VisionTransformer.trace: every layer's and head's attention, the rollout up to every layer, the probabilities, and those with
each head switched off by itself. Attention is kept in 8 bits: of each row the square roots, relative to the row's largest,
because a token that takes nearly all (a class token, a register) would else leave zeros for the rest; see quantise().

Sources: rollout, Abnar & Zuidema 2020 (arXiv:2005.00928), section 3; heads switched off one at a time, Michel et al. 2019
(arXiv:1905.10650), section 3.2.
"""

import argparse
import base64
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit.errors import CheckpointError, ConfigError, run_command, writing_to

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vit.model.vision_transformer import VisionTransformer


IMAGES = (
    8  # unless --limit tells another number, or so many would make the page larger than COMFORTABLE
)


COMFORTABLE, LARGEST = (
    25e6,
    60e6,
)  # bytes of a page: what opens at once, and what a browser can still be asked to open


TEMPLATE = Path(__file__).with_suffix(".html")


@dataclass(frozen=True)
class Snapshot:
    """A model at one moment of its training; step: None where the checkpoint doesn't tell."""

    path: Path
    model: "VisionTransformer"
    step: int | None


@dataclass(frozen=True)
class Example:
    """One picture. image: the model's input (C, height, width) on the CPU; label: its true class, where that is known."""

    name: str
    image: "Tensor"
    label: int | None


def load_snapshot(path: Path) -> Snapshot:
    """The model of a best checkpoint, or of a run's whole state (last, previous) with the weights it evaluates: the averaged
    ones, where there are any. On the CPU, in evaluation mode. Raises CheckpointError as vit.checkpoints.model.load does."""
    from vit.checkpoints.file import read_checkpoint, require_header_keys
    from vit.checkpoints.model import build_from_header, strip_prefix

    tensors, header = read_checkpoint(path)
    if require_header_keys(header, path, "kind")["kind"] == "last":
        tensors = strip_prefix(tensors, "average/") or strip_prefix(tensors, "model/")
    return Snapshot(
        path, build_from_header(path, tensors, header), (header.get("progress") or {}).get("step")
    )


def load_snapshots(paths: Sequence[Path]) -> list[Snapshot]:
    """In the order of their steps, each once: a run's best and last weights are often the same.

    Raises CheckpointError where a checkpoint can't be read, is of another model than the first, or tells no step.
    """
    import torch

    snapshots: list[Snapshot] = []
    for path in paths:
        found = load_snapshot(path)
        if found.step is None and len(paths) > 1:
            raise CheckpointError(
                f"{path}: its header tells no step of training to order it by; leave it out of --also"
            )
        for other in snapshots:
            require_same(found, snapshots[0])
            mine, theirs = found.model.state_dict(), other.model.state_dict()
            if found.step == other.step and all(
                name in theirs and torch.equal(mine[name], theirs[name]) for name in mine
            ):
                print(f"{path}: left out, the same weights as {other.path}")
                break
        else:
            snapshots.append(found)
    return sorted(snapshots, key=lambda snapshot: snapshot.step or 0)


def require_same(found: Snapshot, first: Snapshot) -> None:
    """Raise CheckpointError unless the models differ in nothing but their weights and the heads they lost."""
    from vit.checkpoints.run import check_classes

    check_classes(found.model.classes, first.model.classes, found.path)
    for mine, wanted, name in zip(
        shape(found.model),
        shape(first.model),
        ("preprocessing", "patch grid", "layers", "heads", "pooling", "tokens before the patches"),
        strict=True,
    ):
        if mine != wanted:
            raise CheckpointError(
                f"{found.path}: of another model than {first.path} ({name}: {mine} there, {wanted} here); "
                "--also takes checkpoints of the same run"
            )


def shape(model: "VisionTransformer") -> tuple[Any, ...]:
    """What the maps of two checkpoints must have in common to be shown one after the other; require_same names the parts."""
    from vit.model.head_pruning import attention_modules, num_original_heads

    embeddings = model.embeddings
    return (
        model.preprocessing,
        embeddings.patch_embedding.grid_size,
        len(attention_modules(model)),
        num_original_heads(attention_modules(model)[0]),
        model.global_pool,
        embeddings.num_prefix,
    )


def examples_of_files(paths: Sequence[Path], model: "VisionTransformer") -> list[Example]:
    """Pictures in files; one that lies in a folder named as a class is taken to be of it. Raises DataError."""
    return [
        Example(
            path.name,
            model.preprocessing(path),
            model.classes.index(folder)
            if (folder := path.absolute().parent.name) in model.classes
            else None,
        )
        for path in paths
    ]


def examples_of_data(checkpoint: Path, data_root: str | None, count: int) -> list[Example]:
    """Pictures of the test split of the checkpoint's data set, as evenly over its classes as they go; raises what
    vit.evaluation.restore.restore does."""
    import torch

    from vit.data.loader import evaluation_batches
    from vit.data.splits import sample_evenly
    from vit.evaluation.restore import restore

    restored = restore(
        checkpoint, {} if data_root is None else {"data.root": data_root}, torch.device("cpu")
    )
    chosen = sample_evenly(restored.data.test.labels, count)
    images, labels = next(
        evaluation_batches(
            restored.data.test.subset(chosen),
            count,
            restored.model.preprocessing,
            0,
            torch.device("cpu"),
        )
    )
    return [
        Example(f"{restored.data.test.title}, number {number}", image, label)
        for number, image, label in zip(chosen.tolist(), images, labels.tolist(), strict=True)
    ]


def quantise(rows: "Tensor") -> "Tensor":
    """(…, N) of rows that sum to one → uint8; the page takes q² / Σ q² for them.

    An entry p of a row whose largest is m comes back within about √(p m) / 255 for the rounding, and the row sums to one.
    """
    import torch

    return (rows / rows.amax(dim=-1, keepdim=True)).sqrt().mul(255).round().to(torch.uint8)


def examine(
    model: "VisionTransformer", image: "Tensor", layers: Sequence[int]
) -> tuple["Tensor", "Tensor"]:
    """What one image (C, height, width), on the model's device, does in a model in evaluation mode.

    Returns the maps, uint8 (M, N, N): for each of the layers its heads (those left) and then the rollout up to it; and the
    probabilities, float32 (1 + heads, classes): of the whole model, then with each of those heads switched off by itself.
    """
    import torch

    from vit.model.attention_maps import rollout

    with torch.inference_mode():
        whole = model.trace(image[None])
        maps = [
            quantise(
                torch.cat([whole.attentions[layer][0], rollout(whole.attentions[: layer + 1])])
            )
            for layer in layers
        ]
        logits = [
            whole.logits,
            *(logits_without_heads(model, whole.hidden_states[layer], layer) for layer in layers),
        ]
        return torch.cat(maps).cpu(), torch.cat(logits).softmax(dim=1).cpu()


def logits_without_heads(model: "VisionTransformer", state: "Tensor", layer: int) -> "Tensor":
    """The logits (heads, classes) with each head of a layer switched off by itself, from the one image's state (1, N, D) that
    enters the layer: what trace() with a head_mask gives, without computing the layers below again."""
    import torch

    from vit.model.head_pruning import attention_modules, num_original_heads

    first, *later = list(model.encoder.blocks)[layer:]
    heads = attention_modules(model)[layer].heads
    masks = (
        1
        - torch.eye(num_original_heads(attention_modules(model)[layer]), device=state.device)[heads]
    )
    state = first.trace(state.expand(len(heads), -1, -1), model.encoder.rotation, masks)[0]  # type: ignore[operator]
    for block in later:
        state = block(state, model.encoder.rotation)
    return model.head(model.pooler(model.pool(model.encoder.norm(state))))


def page_bytes(snapshots: Sequence[Snapshot], layers: Sequence[int]) -> int:
    """How much one image adds to the page."""
    from vit.model.head_pruning import attention_modules

    embeddings = snapshots[0].model.embeddings
    tokens = embeddings.num_prefix + embeddings.patch_embedding.num_patches
    heads = sum(
        len(attention_modules(snapshot.model)[layer].heads)
        for snapshot in snapshots
        for layer in layers
    )
    maps, rows = heads + len(snapshots) * len(layers), heads + len(snapshots)
    height, width = embeddings.patch_embedding.image_size
    return (
        (maps * tokens**2 + rows * 4 * len(snapshots[0].model.classes) + 3 * height * width)
        * 4
        // 3
    )


def choose_count(wanted: int | None, an_image: int, snapshots: int) -> int:
    """How many images the page takes: --limit or, without it, up to IMAGES that open comfortably, but one at least.

    an_image: bytes that each adds. Raises ConfigError where the page would be larger than LARGEST.
    """
    count = wanted or max(1, min(IMAGES, int(COMFORTABLE / an_image)))
    if count * an_image > LARGEST:
        most = int(LARGEST / an_image)
        advice = ([f"--limit {most}"] if most else ["fewer --layers"]) + (
            ["fewer --also"] if snapshots > 1 else []
        )
        raise ConfigError(
            f"the page would take {count * an_image / 1e6:.0f} MB, more than {LARGEST / 1e6:.0f}, {count} "
            f"image{'s' * (count > 1)} at {an_image / 1e6:.1f} MB; give {' or '.join(advice)}"
        )
    return count


def encoded(tensor: "Tensor") -> str:
    """The bytes of a tensor, in the order of its axes, little-endian, as base64."""
    array = tensor.contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def page(
    snapshots: Sequence[Snapshot],
    examples: Sequence[Example],
    layers: Sequence[int],
    device: "torch.device",
) -> str:
    """The whole page: TEMPLATE with a description in JSON and, as base64 that is read when it is needed,

    picture-I       RGB (height, width, 3), uint8, of image I
    maps-S-I        what examine() gives of image I in snapshot S
    chances-S-I     its probabilities, float32
    """
    import torch

    from vit.figures.attention import COLORMAP
    from vit.model.head_pruning import attention_modules, num_original_heads

    first = snapshots[0].model
    embeddings, blobs = first.embeddings, {}
    registers = embeddings.num_prefix - int(embeddings.cls_token is not None)
    names = ["class token"] * (embeddings.num_prefix - registers) + [
        f"register {number}" for number in range(registers)
    ]
    about = {
        "classes": first.classes,
        "pool": first.global_pool,
        "prefix": names,
        "layers": list(layers),
        "grid": list(embeddings.patch_embedding.grid_size),
        "size": list(embeddings.patch_embedding.image_size),
        "heads": num_original_heads(attention_modules(first)[0]),
        "colours": COLORMAP.mul(255).round().int().tolist(),
        "width": embeddings.patch_embedding.projection.out_channels,
        "depth": len(attention_modules(first)),
        "images": [{"name": example.name, "label": example.label} for example in examples],
        "snapshots": [
            {
                "file": "/".join(snapshot.path.parts[-3:]),
                "step": snapshot.step,
                "heads": [attention_modules(snapshot.model)[layer].heads for layer in layers],
            }
            for snapshot in snapshots
        ],
    }
    for place, snapshot in enumerate(snapshots):
        model = snapshot.model.to(device)
        for number, example in enumerate(examples):
            maps, chances = examine(model, example.image.to(device), layers)
            blobs[f"maps-{place}-{number}"], blobs[f"chances-{place}-{number}"] = (
                encoded(maps),
                encoded(chances),
            )
    for number, example in enumerate(examples):
        picture = first.preprocessing.denormalize(example.image[None])[0].expand(3, -1, -1)
        blobs[f"picture-{number}"] = encoded(
            picture.mul(255).round().to(torch.uint8).permute(1, 2, 0)
        )
    # A class may be called </script>
    description = json.dumps(about).replace("<", "\\u003c")
    stored = "\n".join(
        f'<script type="text/plain" id="{name}">{text}</script>' for name, text in blobs.items()
    )
    # In this order, as only the description holds words of others, which may be {blobs} too
    return (
        TEMPLATE.read_text("utf-8").replace("{blobs}", stored, 1).replace("{about}", description, 1)
    )


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m vit.explore",
        description="One HTML page to look into a model with: "
        "attention of every patch, layer and head, rollout, and predictions without a head.",
    )
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/best.safetensors")
    parser.add_argument(
        "images",
        type=Path,
        nargs="*",
        metavar="IMAGES",
        help="pictures, or folders of pictures (default: test images of the checkpoint's data set)",
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
        help="more checkpoints of the same run (best, last, previous, …), to see the maps form",
    )
    parser.add_argument(
        "--limit", type=int, help=f"images at most (default: {IMAGES}, or fewer of a large model)"
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", help="only these layers, counted from 0 (default: all)"
    )
    parser.add_argument("--data-root", help="where the data set lies now")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return parser.parse_intermixed_args(given)  # IMAGES may follow --out


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    if options.limit is not None and options.limit <= 0:
        raise ConfigError(f"--limit must be a positive number, got {options.limit}")
    if options.out.is_dir() or options.out.suffix.lower() not in (
        ".html",
        ".htm",
    ):  # nor a checkpoint by mistake
        raise ConfigError(f"--out {options.out}: give the name of a file that ends in .html")
    explore(options)


def explore(options: argparse.Namespace) -> None:
    # Imported here so that --help and a mistaken command answer at once.
    from vit.data.image_files import find_image_files
    from vit.runtime.device import choose_device

    device = choose_device(options.device)
    paths = find_image_files(options.images)
    snapshots = load_snapshots([options.checkpoint, *options.also])
    depth = len(snapshots[0].model.encoder.blocks)
    layers: list[int] = sorted(set(options.layers or range(depth)))
    if not set(layers) <= set(range(depth)):
        raise ConfigError(
            f"--layers {' '.join(map(str, options.layers))}: the model has layers 0 to {depth - 1}"
        )
    an_image = page_bytes(snapshots, layers)
    wanted = options.limit if options.limit is None or not paths else min(options.limit, len(paths))
    count = choose_count(wanted, an_image, len(snapshots))
    temporary = options.out.with_name(f".{options.out.name}.writing")
    with writing_to(
        f"--out {options.out}"
    ):  # before the work, so that a place that can't be written to is told at once
        options.out.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    try:
        if len(paths) > count:
            print(f"the first {count} of {len(paths)} pictures; more with --limit")
        if paths:
            examples = examples_of_files(paths[:count], snapshots[0].model)
        else:
            examples = examples_of_data(options.checkpoint, options.data_root, count)
        html = page(snapshots, examples, layers, device).encode()
        with writing_to(f"--out {options.out}"):
            temporary.write_bytes(html)
            os.replace(temporary, options.out)
    finally:
        temporary.unlink(missing_ok=True)
    moments = f", {len(snapshots)} checkpoints" if len(snapshots) > 1 else ""
    print(
        f"{options.out}: {len(examples)} images{moments}, {len(html) / 1e6:.1f} MB; open it in a browser"
    )


if __name__ == "__main__":
    sys.exit(run_command("vit.explore", main))
