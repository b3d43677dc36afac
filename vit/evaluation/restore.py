"""A best checkpoint and all it takes to measure it again: model, configuration, data set, precision; from the file alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vit.checkpoints.file import require_header_keys
from vit.checkpoints.model import build_model, load_with_header
from vit.checkpoints.run import check_classes
from vit.config.config import Config, from_dict, group_to_dict, to_dict
from vit.config.data import DataConfig, data_arguments
from vit.config.model import ModelConfig
from vit.config.resume import TRAVELS, with_changes
from vit.config.train import TrainingConfig
from vit.data.datasets import load_data
from vit.data.loader import evaluation_batches
from vit.data.preprocessing import Preprocessing
from vit.data.splits import ImageDataset
from vit.errors import CheckpointError, ConfigError
from vit.evaluation.accuracy import evaluate
from vit.model.vision_transformer import VisionTransformer
from vit.runtime.precision import Precision, choose_precision
from vit.weights.loading import load_into, read


@dataclass(frozen=True)
class RestoredModel:
    """model: on the device, in evaluation mode, as vit.load gives it. precision: the one it was trained in."""

    model: VisionTransformer
    header: dict[str, Any]
    config: Config
    data: ImageDataset
    precision: Precision

    def measure(self, model: VisionTransformer, split: str, workers: int) -> dict[str, float]:
        """vit.evaluation.evaluate of this model, or of one made from it, on a split: train, val or test."""
        return evaluate(
            model,
            evaluation_batches(
                self.data.split(split),
                self.config.train.batch_size,
                model.preprocessing,
                workers,
                self.precision.device,
            ),
            self.precision,
        )


def restore(path: Path, changes: dict[str, Any], device: torch.device) -> RestoredModel:
    """changes: keys of the stored configuration to set anew, such as {"data.root": FOLDER} where the data has moved.

    Raises CheckpointError, ConfigError or DataError where the file, a change or the data set is not what it should be.
    """
    model, header = load_with_header(path)
    config = from_dict(with_changes(header["config"], changes), str(path))
    plain = to_dict(config)
    data = load_data(
        **data_arguments(plain["data"], plain["model"]),
        image_size=model.preprocessing.image_size,
        device=device,
    )
    check_classes(header["classes"], data.classes, path)
    precision = require_header_keys(header, path, "precision")["precision"]
    return RestoredModel(model.to(device), header, config, data, Precision(precision, device))


def restore_pretrained(
    path: Path, data: dict[str, Any], model: dict[str, Any] | None, device: torch.device
) -> RestoredModel:
    """Foreign weights on a data set. data: a data node, with a name; model: a model node the weights must fit, or None for
    the model they tell.

    Weights that carry no preprocessing get bilinear to the model's size, mean and std 0.5, and a printed line says so.
    Raises CheckpointError, ConfigError or DataError, as restore does, and where the head is not of the data set's classes.
    """
    if data.get("name") is None:
        raise ConfigError(
            "pretrained=FILE needs data=NAME: foreign weights don't tell what to evaluate them on"
        )
    weights = read(path)
    told = {key: value for key, value in weights.model.items() if key != "num_classes"}
    settings = (
        told
        if model is None
        else {
            **group_to_dict(ModelConfig, model),
            **{key: told[key] for key in TRAVELS if key in told},
        }
    )
    try:
        built = build_model(settings, weights.model.get("num_classes", 0))
    except ValueError as error:
        raise CheckpointError(
            f"{path}: no model to evaluate can be built from these weights ({error})"
        ) from None
    print(load_into(built, weights))
    patches = built.embeddings.patch_embedding
    half = Preprocessing(
        (patches.image_size[0], patches.image_size[1]),
        patches.num_channels,
        (0.5,),
        (0.5,),
        None,
        "bilinear",
    )
    if weights.preprocessing is None:
        print(
            "the file tells no preprocessing: pictures are resized to the model's size (bilinear), mean and std 0.5"
        )
    built.preprocessing = weights.preprocessing or half
    config = Config(data=group_to_dict(DataConfig, data), train=TrainingConfig())  # type: ignore[arg-type]
    precision = choose_precision("auto", device, built.encoder.norm.normalized_shape[0])
    found = load_data(
        **data_arguments(group_to_dict(DataConfig, data), {"num_channels": patches.num_channels}),
        image_size=built.preprocessing.image_size,
        device=device,
    )
    if len(found.classes) != built.head.out_features:
        raise CheckpointError(
            f"{path}: its head has {built.head.out_features} classes, data={data['name']} has "
            f"{len(found.classes)}; fine-tune with train.py pretrained=… first"
        )
    return RestoredModel(
        built.to(device).eval(), {"classes": found.classes}, config, found, precision
    )
