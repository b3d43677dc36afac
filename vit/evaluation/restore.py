"""A checkpoint with everything it takes to measure it again: model, data set and precision.

All of it comes from the file alone, but for foreign weights, which need to be told the data set.
"""

import functools
import math
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit.checkpoints.file import require_header_keys
from vit.checkpoints.model import build_model, load_with_header
from vit.checkpoints.run import check_classes
from vit.config.config import Config, from_dict, group_to_dict, with_changes
from vit.config.data import DataConfig
from vit.config.in_vain import check_typed_model
from vit.config.model import ModelConfig
from vit.config.resume import PREPROCESSING_OF_WEIGHTS, settings_of_weights
from vit.config.settings import check_ranges
from vit.config.train import TrainConfig
from vit.data.loader import PixelReader, evaluation_pixels
from vit.data.preprocessing import Preprocessing
from vit.data.splits import ImageDataset, ImageSplit
from vit.errors import CheckpointError, ConfigError
from vit.evaluation.accuracy import evaluate
from vit.evaluation.protocol import Judge, Protocol
from vit.evaluation.resolution import with_changed_input
from vit.evaluation.test_data import load_for_model, protocol_of, read_for_weights
from vit.model.vision_transformer import VisionTransformer
from vit.runtime.attention_kernels import exclude_faulty_attention
from vit.runtime.memory import MemoryLimit
from vit.runtime.precision import Precision, choose_precision
from vit.weights.description import Weights, squash_preprocessing
from vit.weights.loading import load_into, read

# Images at once where no number is given: more of them are hardly faster, and a training run may
# have spread a larger batch over many GPUs
MAX_BATCH_SIZE = 256


@dataclass(frozen=True)
class RestoredModel:
    """A model and its data set, ready to be measured.

    model: on the device, in evaluation mode, with `preprocessing` as vit.load gives it.
    header: the checkpoint's; of foreign weights only {"classes"}.
    config: the checkpoint's; of foreign weights only `data` and the defaults of `train`.
    precision: as requested, or else the one it was trained in; for foreign weights what `auto`
        chooses.
    batch_size: images at once.
    protocol: which images of the data set are measured, among which classes, in which views.
    memory: what becomes of that number where memory ends.
    """

    model: VisionTransformer
    header: dict[str, Any]
    config: Config
    data: ImageDataset
    precision: Precision
    batch_size: int
    protocol: Protocol = field(default_factory=Protocol)
    memory: MemoryLimit = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory", MemoryLimit(self.precision.device))
        exclude_faulty_attention(self.precision.device, self.model)

    @functools.cached_property
    def judge(self) -> VisionTransformer | Judge:
        """The model as the protocol asks it: the model itself where nothing is special."""
        if self.protocol.views == "one" and self.protocol.competing is None:
            return self.model
        return Judge(self.model, self.protocol).to(self.precision.device).eval()

    def batches(
        self, images: ImageSplit, workers: int, reader: PixelReader | None = None
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Images as to_input of the reader takes them, and their labels, on the device.

        reader: None: model.preprocessing.
        """
        reader = reader or self.model.preprocessing
        return evaluation_pixels(images, self.batch_size, reader, workers, self.precision.device)

    def measure(
        self,
        model: VisionTransformer | Judge,
        split: str,
        workers: int,
        counted: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """vit.evaluation.accuracy.evaluate of this model, or of one made from it, on a split.

        split: train, val or test. counted: see evaluate. Raises DataError where there is no such
        split.
        """
        return self.measure_images(model, self.data.split(split), workers, counted)

    def measure_images(
        self,
        model: VisionTransformer | Judge,
        images: ImageSplit,
        workers: int,
        counted: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """As measure(), on any images of the data set's classes.

        Raises ConfigError where outputs are not finite, as where 16 bits overflow.
        """
        metrics = evaluate(
            model,
            self.batches(images, workers, model.preprocessing),
            self.precision,
            prepare=model.preprocessing.to_input,
            memory=self.memory,
            counted=counted,
        )
        # NaN has a largest element too, so that accuracies look like those of a bad model
        if not math.isfinite(metrics["loss"]):
            advice = "try evaluate.py with precision=fp32"
            if self.precision.name == "fp32":
                advice = "its weights have diverged; train again at a lower optimizer.lr"
            raise ConfigError(
                f"{images}: outputs of the model are not finite in {self.precision.name}, so there "
                f"is nothing to report; {advice}"
            )
        return metrics


def restore(
    path: Path,
    changes: dict[str, Any],
    device: torch.device,
    precision: str | None = None,
    batch_size: int | None = None,
) -> RestoredModel:
    """Restore a best checkpoint of this project.

    changes: {key: value} to set anew in the stored configuration, such as
        {"data.root": FOLDER} where the data has moved, or {"model.image_size": 384}, to which
        positions are resized.
    precision, batch_size: None for those of the run, the batch with at most MAX_BATCH_SIZE images.

    Raises CheckpointError, ConfigError or DataError where the file, a change or the data set is
    not what it should be.
    """
    return restore_loaded(path, *load_with_header(path), changes, device, precision, batch_size)


def restore_loaded(
    path: Path,
    model: VisionTransformer,
    header: dict[str, Any],
    changes: dict[str, Any],
    device: torch.device,
    precision: str | None,
    batch_size: int | None,
) -> RestoredModel:
    """restore() of a checkpoint that is loaded already: its model and header."""
    require_data(path, header)
    config = from_dict(with_changes(header["config"], changes), str(path))
    check_ranges(config, changes)
    model = with_changed_input(model, header["config"]["model"], changes)
    data = load_for_model(config.data, model, device, changes)
    # A folder of images may have changed since training
    check_classes(header["classes"], data.classes, path)
    # Fewer images differ in any case, and shards are known by the name of their folder
    renamed = config.data.name == "shards" and "data.root" in changes
    if "data.limit" not in changes and not renamed:
        warn_of_other_images(header, data)
    trained_in = require_header_keys(header, path, "precision")["precision"]
    return RestoredModel(
        model=model.to(device),
        header=header,
        config=config,
        data=data,
        precision=choose_precision(precision or trained_in, device, model.hidden_size),
        batch_size=batch_size or default_batch_size(config.train),
    )


def require_data(path: Path, header: dict[str, Any]) -> None:
    """Raise CheckpointError for a checkpoint that vit.export has made of foreign weights."""
    if "data" not in header["config"]:
        raise CheckpointError(
            f"{path}: no run of this program trained it, so it names no data set; measure it with "
            f"evaluate.py pretrained={path} data=NAME"
        )


def warn_of_other_images(header: dict[str, Any], data: ImageDataset) -> None:
    """Print a warning where the images of train are not those that the run was trained on.

    What is cut from train depends on all of its images, so that with others the images of val and
    test may be some that the model was trained on.
    """
    # Older headers have no checksum
    if header.get("data") not in (None, data.train.fingerprint()):
        print(
            f"warning: the images of train ({data.train}) are not those that this model was "
            "trained on; where val or test is cut from train, it may have seen some of theirs"
        )


def default_batch_size(train: TrainConfig) -> int:
    """How many images are evaluated at once: those of the run's forward passes, within limits."""
    return min(MAX_BATCH_SIZE, train.micro_batch_size or train.batch_size)


def restore_pretrained(
    path: Path,
    data: dict[str, Any],
    model: dict[str, Any] | None,
    device: torch.device,
    precision: str | None = None,
    batch_size: int | None = None,
    typed: Collection[str] = (),
) -> RestoredModel:
    """Restore foreign weights on a data set.

    data: values of the group `data`, with a name.
    model: values of the group `model`, which the weights must fit; None, or without a name: the
        model that the file describes, maybe of another image_size.
    typed: the keys of both, with dots, that the user has given. They win over what the file says.
    precision, batch_size: None for what `auto` chooses, and for the default of training.

    Raises CheckpointError, ConfigError or DataError, as restore() does, and where the head does not
    have the data set's classes.
    """
    if data.get("name") is None:
        raise ConfigError(
            "pretrained=FILE needs data=NAME: the file does not say what to evaluate it on"
        )
    weights = read(path)
    loaded = build_for_weights(path, weights, model, typed)
    print(load_into(loaded, weights))
    if weights.preprocessing is None:
        print(
            "the file holds no preprocessing: images are resized to the model's size (bilinear), "
            "mean and std 0.5; data.mean, data.std, data.eval_crop and data.interpolation change it"
        )

    data_config = DataConfig(**group_to_dict("data", DataConfig, data))
    loaded.preprocessing = preprocessing_for(loaded, weights, data_config, typed)
    # Only the batch size is used of the latter
    train_config = TrainConfig(**group_to_dict("train", TrainConfig, {}))
    config = Config(data=data_config, train=train_config)
    check_ranges(config, [key for key in typed if key.startswith("data.")])
    test_set = read_for_weights(path, data_config, loaded, weights.classes, device, typed)
    return RestoredModel(
        model=loaded.to(device).eval(),
        header={"classes": test_set.data.classes},
        config=config,
        data=test_set.data,
        precision=choose_precision(precision or "auto", device, loaded.hidden_size),
        batch_size=batch_size or default_batch_size(train_config),
        protocol=protocol_of(test_set),
    )


def build_for_weights(
    path: Path, weights: Weights, model: dict[str, Any] | None, typed: Collection[str] = ()
) -> VisionTransformer:
    """A new model of the shape of foreign weights, or of the group `model` where it is given.

    What the weights were trained with, such as the activation, is the file's in both cases, unless
    its key (model.activation) is typed. Raises CheckpointError where no such model can be built,
    and where the weights have no head.
    """
    if "num_classes" not in weights.model:
        raise CheckpointError(
            f"{path}: holds no head, so it predicts no classes; fine-tune it first "
            "(train.py pretrained=…)"
        )
    arguments = {key: value for key, value in weights.model.items() if key != "num_classes"}
    resized = None if model is None else model.get("image_size")
    if model is not None and "name" in model:
        values = group_to_dict("model", ModelConfig, model)
        check_typed_model(ModelConfig(**values), typed)
        trained_with = {
            key: value
            for key, value in settings_of_weights(arguments, bool(values["conv_stem"])).items()
            if f"model.{key}" not in typed
        }
        arguments = values | trained_with
    elif resized is not None:
        arguments |= {"image_size": resized}
    try:
        return build_model(arguments, weights.model["num_classes"])
    except ValueError as error:
        raise CheckpointError(
            f"{path}: no model can be built for these weights ({error})"
        ) from None


def preprocessing_for(
    model: VisionTransformer, weights: Weights, data: DataConfig, typed: Collection[str]
) -> Preprocessing:
    """What the file of the weights says, or else squash_preprocessing, at the model's size.

    The keys of the group `data` that are typed (data.mean, …) win over both.
    """
    patches = model.embeddings.patch_embedding
    changes = {"image_size": patches.image_size, "num_channels": patches.num_channels}
    for key in PREPROCESSING_OF_WEIGHTS:
        if f"data.{key}" in typed:
            changes[key] = getattr(data, key)
    known = weights.preprocessing or squash_preprocessing(weights.model)
    return Preprocessing.from_dict(known.to_dict() | changes)
