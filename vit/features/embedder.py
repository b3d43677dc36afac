"""The model of a checkpoint, or of foreign weights, as a function from pixels to features."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vit.checkpoints.file import digest
from vit.errors import ConfigError
from vit.model.vision_transformer import VisionTransformer
from vit.runtime.attention_kernels import exclude_faulty_attention
from vit.runtime.memory import MemoryLimit
from vit.runtime.precision import Precision, choose_precision
from vit.weights.description import squash_preprocessing
from vit.weights.loading import build_from, read

# Features are computed below the heads, so the heads make no difference
HEADS = ("head.", "head_distill.")


@dataclass(frozen=True)
class Embedder:
    """Computes features.

    checkpoint: SHA-256 of all that they depend on: weights, architecture, preprocessing.
    """

    model: VisionTransformer
    precision: Precision
    memory: MemoryLimit
    checkpoint: str

    @property
    def width(self) -> int:
        """The length of a feature vector."""
        return self.model.head.in_features

    def __call__(self, pixels: Tensor | None) -> np.ndarray:
        """uint8 (B, C, *image_size) → float32 (B, width), in parts where memory ends.

        None, for no pixels, gives no rows. Raises ConfigError where a number is not finite, as
        where 16 bits overflow.
        """
        if pixels is None:
            return np.empty((0, self.width), np.float32)
        features = torch.cat(list(self.memory.parts(self.compute, pixels)))
        if not features.isfinite().all():
            raise ConfigError(
                f"--precision {self.precision.name}: features are not finite; try --precision fp32"
            )
        return features.numpy()

    def compute(self, pixels: Tensor) -> Tensor:
        images = self.model.preprocessing.to_input(pixels.to(self.precision.device))
        with torch.inference_mode(), self.precision.autocast():
            return self.model.features(images).float().cpu()


def load_embedder(
    source: str, precision: str, device: torch.device, say: Callable[[str], None]
) -> Embedder:
    """Load a checkpoint of this project, or weights of any format that vit.weights knows.

    source: a path, or a name such as hf:OWNER/NAME. say: is told what the file does not state.
    Raises CheckpointError.
    """
    weights = read(source)
    # A head is not needed, and not computed
    model = build_from(weights, None if "num_classes" in weights.model else 1)
    if weights.preprocessing is None:
        model.preprocessing = squash_preprocessing(weights.model)
        say(
            f"{source}: holds no preprocessing: images are resized to the model's size (bilinear), "
            "mean and std 0.5"
        )
    exclude_faulty_attention(device, model)
    return Embedder(
        model.to(device),
        choose_precision(precision, device, model.hidden_size),
        MemoryLimit(device, say),
        checkpoint_digest(model, weights.model),
    )


def checkpoint_digest(model: VisionTransformer, arguments: dict) -> str:
    """SHA-256 of what features depend on; arguments: with which the model was built."""
    tensors = {
        name: tensor for name, tensor in model.state_dict().items() if not name.startswith(HEADS)
    }
    described = {key: value for key, value in arguments.items() if key != "num_classes"}
    described["preprocessing"] = model.preprocessing.to_dict()
    return digest(tensors, json.dumps(described, sort_keys=True))
