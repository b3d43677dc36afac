"""Write a model in another library's format.

    python -m vit.export outputs/…/checkpoints/best.safetensors --format hf --out folder
    python -m vit.export B_16.npz --format safetensors --out b16.safetensors

The first argument is anything `pretrained=` takes. hf and timm make a folder, the others one file:
hf           ViTForImageClassification.from_pretrained(FOLDER), and ViTImageProcessor's
timm         timm.create_model("local-dir:FOLDER", pretrained=True)
torchvision  a state_dict; the command prints the model to load it into
npz          arrays under vit_jax's names
safetensors  a checkpoint of this project, for vit.load and evaluate.py
onnx         images (batch, C, height, width) → logits (batch, classes), for any batch; checked with
             onnxruntime
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vit.errors import ConfigError, run_command, writing_to

FORMATS = ("hf", "timm", "torchvision", "npz", "safetensors", "onnx")


def export(source: Path | str, kind: str, out: Path | str) -> list[str]:
    """Write `source` to `out`, whole or not at all; returns notes for the user.

    source: anything that vit.weights.loading.read takes. kind: one of FORMATS. Raises UserError
    where the source can't be read, the format can't express the model, or `out` exists already.
    """
    # Imported here, so that --help doesn't wait for torch
    from vit.weights.loading import read
    from vit.weights.writing import WRITERS

    out = Path(out)
    weights = read(source)
    if out.exists():
        raise ConfigError(f"--out {out}: is there already; remove it or choose another")
    folder = None
    try:
        with writing_to(f"--out {out}"):
            out.parent.mkdir(parents=True, exist_ok=True)
            # Beside `out`, so that moving it there is a rename on the same disk
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            # What was assumed is stated in the written file, so this is the moment to say it
            notes = weights.assumptions() + WRITERS[kind](weights, folder / out.name)
            move_into_place(folder, out)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return notes


def move_into_place(folder: Path, out: Path) -> None:
    """Move what was written in `folder` beside `out`, and last of all `out` itself.

    A large ONNX file keeps its tensors in a second file, which has to be there first.
    """
    for path in folder.iterdir():
        if path.name != out.name:
            os.replace(path, out.parent / path.name)
    os.replace(folder / out.name, out)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; `arguments` instead of sys.argv for tests. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m vit.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Not a Path, which would take https:// for https:/
    parser.add_argument("checkpoint", help="a checkpoint, or weights of another library")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="file or folder to write; must not be there yet"
    )
    options = parser.parse_args(arguments)
    notes = export(options.checkpoint, options.format, options.out)
    print(f"written to {options.out}")
    for note in notes:
        print(f"  {note}")


if __name__ == "__main__":
    sys.exit(run_command("vit.export", main))
