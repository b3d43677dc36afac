"""A checkpoint with everything it takes to measure it again: model, data set and precision.

All of it comes from the file alone, but for foreign weights, which need to be told the data set.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vit.checkpoints.file import require_header_keys
from vit.checkpoints.model import build_model, load_with_header
from vit.checkpoints.run import check_classes
from vit.config.config import Config, from_dict, group_to_dict, with_changes
from vit.config.data import DataConfig, data_arguments
from vit.config.model import ModelConfig
from vit.config.resume import MODEL_SETTINGS_OF_WEIGHTS
from vit.config.train import TrainConfig
from vit.data.datasets import load_data
from vit.data.loader import evaluation_batches
from vit.data.preprocessing import Preprocessing
from vit.data.splits import ImageDataset
from vit.errors import CheckpointError, ConfigError
from vit.evaluation.accuracy import evaluate
from vit.model.vision_transformer import VisionTransformer
from vit.runtime.precision import Precision, choose_precision
from vit.weights.description import Weights
from vit.weights.loading import load_into, read


@dataclass(frozen=True)
class RestoredModel:
    """A model and its data set, ready to be measured.

    model: on the device, in evaluation mode, with `preprocessing` as vit.load gives it.
    header: the checkpoint's; of foreign weights only {"classes"}.
    config: the checkpoint's; of foreign weights only `data` and the defaults of `train`.
    precision: the one it was trained in; for foreign weights what `auto` chooses.
    """

    model: VisionTransformer
    header: dict[str, Any]
    config: Config
    data: ImageDataset
    precision: Precision

    def measure(self, model: VisionTransformer, split: str, workers: int) -> dict[str, float]:
        """vit.evaluation.accuracy.evaluate of this model, or of one made from it, on a split.

        split: train, val or test. Raises DataError where there is no val.
        """
        batches = evaluation_batches(
            self.data.split(split),
            self.config.train.batch_size,
            model.preprocessing,
            workers,
            self.precision.device,
        )
        return evaluate(model, batches, self.precision)


def restore(path: Path, changes: dict[str, Any], device: torch.device) -> RestoredModel:
    """Restore a best checkpoint of this project.

    changes: {key: value} to set anew in the stored configuration, such as
        {"data.root": FOLDER} where the data has moved.

    Raises CheckpointError, ConfigError or DataError where the file, a change or the data set is
    not what it should be.
    """
    model, header = load_with_header(path)
    config = from_dict(with_changes(header["config"], changes), str(path))
    data = load_data(
        **data_arguments(config.data, config.model.num_channels),
        image_size=model.preprocessing.image_size,
        device=device,
    )
    # A folder of images may have changed since training
    check_classes(header["classes"], data.classes, path)
    name = require_header_keys(header, path, "precision")["precision"]
    return RestoredModel(model.to(device), header, config, data, Precision(name, device))


def restore_pretrained(
    path: Path, data: dict[str, Any], model: dict[str, Any] | None, device: torch.device
) -> RestoredModel:
    """Restore foreign weights on a data set.

    data: values of the group `data`, with a name.
    model: values of the group `model`, which the weights must fit; None: the model that the file
        describes.

    Raises CheckpointError, ConfigError or DataError, as restore() does, and where the head does not
    have the data set's classes.
    """
    if data.get("name") is None:
        raise ConfigError(
            "pretrained=FILE needs data=NAME: the file does not say what to evaluate it on"
        )
    weights = read(path)
    loaded = build_for_weights(path, weights, model)
    print(load_into(loaded, weights))
    loaded.preprocessing = weights.preprocessing or assumed_preprocessing(loaded)
    if weights.preprocessing is None:
        print(
            "the file holds no preprocessing: images are resized to the model's size (bilinear), "
            "mean and std 0.5"
        )

    data_config = DataConfig(**group_to_dict("data", DataConfig, data))
    # Only the batch size is used of these
    train_config = TrainConfig(**group_to_dict("train", TrainConfig, {}))
    dataset = load_data(
        **data_arguments(data_config, loaded.embeddings.patch_embedding.num_channels),
        image_size=loaded.preprocessing.image_size,
        device=device,
    )
    # Foreign weights rarely name their classes: the number is all that can be compared
    if len(dataset.classes) != loaded.head.out_features:
        raise CheckpointError(
            f"{path}: its head has {loaded.head.out_features} classes, data={data_config.name} "
            f"has {len(dataset.classes)}; fine-tune with train.py pretrained=… first"
        )
    return RestoredModel(
        model=loaded.to(device).eval(),
        header={"classes": dataset.classes},
        config=Config(data=data_config, train=train_config),
        data=dataset,
        precision=choose_precision("auto", device, loaded.encoder.norm.normalized_shape[0]),
    )


def build_for_weights(
    path: Path, weights: Weights, model: dict[str, Any] | None
) -> VisionTransformer:
    """A new model of the shape of foreign weights, or of the group `model` where it is given.

    What the weights were trained with, such as the activation, is the file's in both cases.
    Raises CheckpointError where no such model can be built.
    """
    arguments = {key: value for key, value in weights.model.items() if key != "num_classes"}
    if model is not None:
        trained_with = {
            key: value for key, value in arguments.items() if key in MODEL_SETTINGS_OF_WEIGHTS
        }
        arguments = group_to_dict("model", ModelConfig, model) | trained_with
    try:
        return build_model(arguments, weights.model.get("num_classes", 0))
    except ValueError as error:
        raise CheckpointError(
            f"{path}: no model can be built for these weights ({error})"
        ) from None


def assumed_preprocessing(model: VisionTransformer) -> Preprocessing:
    """For weights whose file holds none: the one of the ViT paper's code.

    Images are resized to the model's size, and their pixels scaled to -1..1.
    """
    patches = model.embeddings.patch_embedding
    height, width = patches.image_size
    return Preprocessing(
        image_size=(height, width),
        num_channels=patches.num_channels,
        mean=(0.5,),
        std=(0.5,),
        eval_crop=None,
        interpolation="bilinear",
    )
