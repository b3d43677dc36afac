"""How a number was measured: which images, which classes compete, which views, which crop and size.

Numbers of two protocols can't be compared, so each is written with its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit.data.preprocessing import Preprocessing
from vit.data.splits import ImageSplit, first_names
from vit.data.views import NUM_CROPS, FiveCrops
from vit.model.vision_transformer import VisionTransformer

VIEWS = {
    "one": "one view",
    "mirrored": "2 views (the image and its mirror image), mean of their probabilities",
    "five_crop": "5 views (corners and center), mean of their probabilities",
    "ten_crop": "10 views (corners and center, each mirrored too), mean of their probabilities",
}
CROPPED = ("five_crop", "ten_crop")
MIRRORED = ("mirrored", "ten_crop")

# The logit of a class that does not compete: its probability is 0 in float32, and unlike an
# infinite one it leaves sums and temperatures finite
NOT_COMPETING = -1e4


@dataclass(frozen=True)
class Protocol:
    """How the numbers of an evaluation are to be understood.

    taken: which images of the data set these are, in words. views: a key of VIEWS. competing,
    answers: see vit.data.test_sets.TestSet.
    """

    taken: str = "the run's own cut"
    views: str = "one"
    competing: Tensor | None = None
    answers: Tensor | None = None

    def describe(
        self, preprocessing: Preprocessing, images: ImageSplit, classes: Sequence[str]
    ) -> dict[str, Any]:
        """The protocol for evaluation.json, in words but for the classes without images."""
        present = images.labels.unique() if self.answers is None else self.answers.any(0).nonzero()
        missing = sorted(set(range(len(classes))) - set(present.flatten().tolist()))
        return {
            "images": self.taken,
            "classes": self.describe_classes(len(classes)),
            "classes_without_images": [classes[index] for index in missing],
            "views": VIEWS[self.views],
            "input": describe_input(preprocessing, images),
        }

    def describe_classes(self, num_classes: int) -> str:
        if self.competing is not None:
            text = f"{len(self.competing):,} of the model's {num_classes:,} classes compete"
        else:
            text = f"all of the model's {num_classes:,} classes compete"
        if self.answers is not None:
            text += ", any of an image's labels is right"
        return text


def protocol_line(described: dict[str, Any]) -> str:
    """Protocol.describe() in one line for the screen."""
    parts = [described[key] for key in ("images", "classes", "views", "input")]
    missing = described["classes_without_images"]
    if missing:
        parts.insert(2, f"{len(missing):,} of the model's have no image ({first_names(missing)})")
    return f"protocol: {'; '.join(parts)}"


def describe_input(preprocessing: Preprocessing, images: ImageSplit) -> str:
    """How an image becomes the model's input, in words."""
    height, width = preprocessing.image_size
    how = preprocessing.interpolation
    if images.pixels is not None:
        if images.pixels.shape[-2:] == preprocessing.image_size:
            return f"{height}x{width} px as they are"
        return f"resized to {height}x{width} px ({how})"
    if preprocessing.eval_crop is None:
        return f"squashed to {height}x{width} px ({how})"
    # What an image of the crop's shape is resized to; of others the side that is scaled most is
    columns, rows = preprocessing.size_before_crop(1000 * width, 1000 * height)
    resized = f"shorter side to {rows} px" if rows == columns else f"to cover {rows}x{columns} px"
    return f"{resized} ({how}), crop {height}x{width} px"


class Judge(nn.Module):
    """A model as a protocol asks it: about some classes alone, or about several views of an image.

    Its logits are the model's. Of several views they are the logarithms of the mean of the
    probabilities, as Krizhevsky et al. 2012 average (section 4.1), so that the loss is that of the
    mean. Classes that do not compete get no probability.
    """

    excluded: Tensor | None  # bool (classes,), on the device of the weights

    def __init__(self, network: VisionTransformer, protocol: Protocol):
        super().__init__()
        self.network = network
        cropped = protocol.views in CROPPED
        self.num_crops = NUM_CROPS if cropped else 1
        self.mirrors = protocol.views in MIRRORED
        own = network.preprocessing
        self.preprocessing = FiveCrops(own) if cropped else own
        mask = None
        if protocol.competing is not None:
            mask = torch.ones(network.head.out_features, dtype=torch.bool)
            mask[protocol.competing] = False
        self.register_buffer("excluded", mask)

    @property
    def head(self) -> nn.Linear:
        return self.network.head

    def forward(self, inputs: Tensor) -> Tensor:
        """(B·crops, C, height, width), the crops of an image in a row → (B, classes)."""
        views = list(inputs.unflatten(0, (-1, self.num_crops)).unbind(1))
        if self.mirrors:
            views += [view.flip(-1) for view in views]
        logits = [self.restrict(self.network(view).float()) for view in views]
        if len(logits) == 1:
            return logits[0]
        log_probabilities = torch.stack([each.log_softmax(dim=1) for each in logits])
        return log_probabilities.logsumexp(dim=0) - math.log(len(logits))

    def restrict(self, logits: Tensor) -> Tensor:
        """Logits (B, classes) of the classes that compete; the others get none to speak of."""
        if self.excluded is None:
            return logits
        return logits.masked_fill(self.excluded, NOT_COMPETING)
