"""ONNX: images (batch, C, height, width) → logits (batch, classes), for any batch."""

import importlib.util
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from vit.errors import ConfigError
from vit.weights.description import Weights, as_pair, input_preprocessing
from vit.weights.loading import build_from

OPSET = 18  # the oldest that torch's exporter writes without converting

TOLERANCE = 1e-4  # of the logits, relative to their largest


def write(weights: Weights, out: Path) -> list[str]:
    """Write an ONNX file and check it with onnxruntime, where that is installed.

    Classes and preprocessing go into its metadata, as JSON. Returns a note on the check. Raises
    ConfigError where onnx is missing, or where onnxruntime computes other logits.
    """
    require_packages("onnx", "onnxscript")
    model = build_from(weights)
    height, width = as_pair(weights.model["image_size"])
    shape = (2, weights.model["num_channels"], height, width)
    # A batch of two: the exporter would take one for a constant.
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    batch = {0: torch.export.Dim("batch")}
    graph = torch.export.export(model, (example,), dynamic_shapes=(batch,), strict=True)
    program = torch.onnx.export(
        graph,
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(new_metadata(weights))
    program.save(out)
    return [check(model, example, out)]


def require_packages(*names: str) -> None:
    """Raise ConfigError, which says what to install, where a package is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--format onnx needs {' and '.join(missing)}; "
            "install with: pip install onnx onnxscript onnxruntime"
        )


def new_metadata(weights: Weights) -> dict[str, str]:
    """What the file says about classes and preprocessing, where that is known."""
    metadata = {}
    if weights.classes is not None:
        metadata["classes"] = json.dumps(weights.classes)
    if weights.preprocessing is not None:
        metadata["preprocessing"] = json.dumps(input_preprocessing(weights).to_dict())
    return metadata


def check(model: nn.Module, example: Tensor, path: Path) -> str:
    """Compare onnxruntime's logits with PyTorch's for a batch of 1 and of 3; returns a note.

    Raises ConfigError where they differ by more than TOLERANCE.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return "not checked against PyTorch: onnxruntime is not installed"
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    # Other batch sizes than the one that was exported with
    for images in (example[:1], torch.cat([example, example[:1] * 0.5])):
        with torch.inference_mode():
            expected = model(images)
        logits = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        largest = expected.abs().max().clamp(min=1)
        worst = max(worst, ((logits - expected).abs().max() / largest).item())
    if not worst <= TOLERANCE:  # so that NaN fails too
        raise ConfigError(
            f"{path.name}: onnxruntime's logits differ from PyTorch's by {worst:.1e}; "
            "nothing was written"
        )
    return f"onnxruntime's logits differ from PyTorch's by at most {worst:.1e}"
