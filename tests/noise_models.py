"""Untrained models on data sets of noise, for tests of what is measured and drawn of a model."""

from pathlib import Path

import torch

from vit.config.config import Config
from vit.config.train import TrainConfig
from vit.data.preprocessing import Preprocessing
from vit.data.splits import ImageDataset, ImageSplit
from vit.evaluation.measurements import MeasuredModel
from vit.evaluation.restore import RestoredModel
from vit.model.vision_transformer import VisionTransformer
from vit.runtime.precision import Precision

SMALL = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 2}


def restored_model(classes: list[str], count: int, **changes) -> RestoredModel:
    """An untrained model and `count` images of noise a split; changes: arguments of the model."""
    torch.manual_seed(0)
    model = VisionTransformer(num_classes=len(classes), **{**SMALL, **changes}).eval()
    patches = model.embeddings.patch_embedding
    model.preprocessing = Preprocessing(
        patches.image_size, patches.num_channels, (0.5,), (0.25,), None, "bilinear"
    )
    shape = (count, patches.num_channels, *patches.image_size)
    splits = [
        ImageSplit(
            f"noise {name}",
            torch.arange(count) % len(classes),
            torch.randint(0, 256, shape, dtype=torch.uint8),
        )
        for name in ("train", "val", "test")
    ]
    config = Config(train=TrainConfig())
    return RestoredModel(
        model=model,
        header={"classes": classes},
        config=config,
        data=ImageDataset(classes, *splits),
        precision=Precision("fp32", torch.device("cpu")),
        batch_size=64,
    )


def measured_model(restored: RestoredModel, split: str = "test") -> MeasuredModel:
    return MeasuredModel(Path("x.safetensors"), restored, split, workers=0)
