"""The formats that weights can be written in."""

from collections.abc import Callable
from pathlib import Path

from vit.weights import huggingface, npz, onnx, own, timm, torchvision
from vit.weights.description import Weights

# Each writes a file or a folder, and returns notes for the user.
WRITERS: dict[str, Callable[[Weights, Path], list[str]]] = {
    "hf": huggingface.write,
    "timm": timm.write,
    "torchvision": torchvision.write,
    "npz": npz.write,
    "safetensors": own.write,
    "onnx": onnx.write,
}
