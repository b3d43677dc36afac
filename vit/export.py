"""Write a model in another library's format.

    python -m vit.export outputs/…/checkpoints/best.safetensors --format hf --out folder
    python -m vit.export B_16.npz --format safetensors --out b16.safetensors

The first argument is anything `pretrained=` takes. hf and timm make a folder, the others one file:
hf           ViTForImageClassification.from_pretrained(FOLDER), ViTImageProcessor.from_pretrained(FOLDER)
timm         timm.create_model("local-dir:FOLDER", pretrained=True)
torchvision  a state_dict; the command prints the model to load it into
npz          arrays under vit_jax's names
safetensors  a checkpoint of this project, for vit.load and evaluate.py
onnx         images (batch, C, height, width) → logits (batch, classes), for any batch; checked with onnxruntime
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from vit.errors import ConfigError, run_command, writing_to
from vit.weights import huggingface, npz, own, timm, torchvision
from vit.weights.description import Weights, as_pair
from vit.weights.loading import build, read

OPSET = 18  # the oldest that torch's exporter writes without converting


ONNX_TOLERANCE = 1e-4  # of the logits, relative to their largest


def write_onnx(weights: Weights, out: Path) -> list[str]:
    """Raises ConfigError, saying what to install, where onnx is missing, or where onnxruntime computes other logits."""
    if missing := [
        name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None
    ]:
        raise ConfigError(
            f"--format onnx needs {' and '.join(missing)}; install with: pip install onnx onnxscript onnxruntime"
        )
    model = build(weights.path)
    shape = (2, weights.model["num_channels"], *as_pair(weights.model["image_size"]))
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    graph = torch.export.export(
        model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=True
    )
    program = torch.onnx.export(
        graph,
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    told = {
        "classes": weights.classes,
        "preprocessing": weights.preprocessing and weights.preprocessing.to_dict(),
    }
    program.model.metadata_props.update(
        {key: json.dumps(value) for key, value in told.items() if value is not None}
    )
    program.save(out)
    return [check_onnx(model, example, out)]


def check_onnx(model: torch.nn.Module, example: torch.Tensor, path: Path) -> str:
    """Compare a batch of 1 and of 3 with PyTorch's logits; returns what was found, in words."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "not checked against PyTorch: onnxruntime is not installed"
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for images in (example[:1], torch.cat([example, example[:1] * 0.5])):
        with torch.inference_mode():
            expected = model(images)
        found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        worst = max(
            worst, ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
        )
    if not worst <= ONNX_TOLERANCE:
        raise ConfigError(
            f"{path.name}: onnxruntime's logits differ from PyTorch's by {worst:.1e}; nothing was written"
        )
    return f"onnxruntime's logits differ from PyTorch's by at most {worst:.1e}"


FORMATS = {
    "hf": huggingface.write,
    "timm": timm.write,
    "torchvision": torchvision.write,
    "npz": npz.write,
    "safetensors": own.write,
    "onnx": write_onnx,
}


def export(source: Path | str, kind: str, out: Path | str) -> list[str]:
    """Write `source`, anything vit.weights.read takes, to `out`, whole or not at all; returns notes for the user.

    Raises UserError where the source can't be read, the format has no place for the model, or `out` is there already.
    """
    out, weights = Path(out), read(source)
    if out.exists():
        raise ConfigError(f"--out {out}: is there already; remove it or choose another")
    folder = None
    try:
        with writing_to(f"--out {out}", "choose another"):
            out.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            notes = FORMATS[kind](weights, folder / out.name)
            for item in sorted(
                folder.iterdir(), key=lambda item: item.name == out.name
            ):  # an ONNX file's data goes first
                os.replace(item, out.parent / item.name)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return notes


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vit.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or weights of another library")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="file or folder to write; must not be there yet"
    )
    options = parser.parse_args(given)
    notes = export(options.checkpoint, options.format, options.out)
    print("\n".join([f"written to {options.out}", *(f"  {note}" for note in notes)]))


if __name__ == "__main__":
    sys.exit(run_command("vit.export", main))
