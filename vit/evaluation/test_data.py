"""The data sets of evaluate.py that are not the run's own, labeled by the model's classes."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from vit.config.data import DataConfig, data_arguments
from vit.data.class_folders import class_names, imagenet_wnids
from vit.data.class_matching import in_the_same_order, match_classes, only_one_has_names
from vit.data.datasets import load_data
from vit.data.parquet_index import find_parquet
from vit.data.splits import ImageDataset, ImageSplit
from vit.data.test_sets import TEST_SETS, TestSet, read_test_set, splits_in
from vit.errors import CheckpointError, ConfigError, DataError
from vit.evaluation.protocol import Protocol
from vit.model.vision_transformer import VisionTransformer

# Data sets that are taken whole, of which no key cuts a split
WHOLE = ("folder", *TEST_SETS)


def protocol_of(test_set: TestSet) -> Protocol:
    return Protocol(test_set.taken, competing=test_set.competing, answers=test_set.answers)


def load_for_model(
    data: DataConfig,
    model: VisionTransformer,
    device: torch.device,
    typed: Collection[str] = (),
) -> ImageDataset:
    """A data set with its own splits or cuts, its images as the model takes them.

    typed: the keys that the user has given. Raises ConfigError or DataError.
    """
    preprocessing = model.preprocessing
    return load_data(
        **data_arguments(data, preprocessing.num_channels),
        image_size=preprocessing.image_size,
        device=device,
        typed={key.removeprefix("data.") for key in typed},
    )


def read_data(
    data: DataConfig,
    model: VisionTransformer,
    classes: list[str],
    device: torch.device,
    typed: Collection[str],
) -> TestSet:
    """Read a data set that is not the run's, labeled by the model's classes.

    typed: the keys that the user has given. Raises ConfigError or DataError.
    """
    if data.name in WHOLE:
        check_whole(data, typed)
        assert data.root is not None
        return read_test_set(data.name, Path(data.root), classes).limited(data.limit)
    dataset = load_for_model(data, model, device, typed)
    return TestSet(relabeled(dataset, classes, data), f"data={data.name}, not the run's data set")


def check_whole(data: DataConfig, typed: Collection[str]) -> None:
    """Raise ConfigError for a key that does nothing where a folder is taken whole, or no folder."""
    if data.root is None:
        raise ConfigError(f"data={data.name} needs data.root=FOLDER")
    for key in ("data.val_fraction", "data.test_fraction"):
        if key in typed:
            raise ConfigError(
                f"{key} does nothing here: {data.root} is taken whole, since it is not the data "
                "set of the run; leave it out"
            )


def relabeled(dataset: ImageDataset, classes: list[str], data: DataConfig) -> ImageDataset:
    """A data set with the labels of a model's classes; raises DataError for other classes."""
    source = Path(f"data={data.name}" if data.root is None else data.root)
    try:
        indices = torch.tensor(match_classes(dataset.classes, classes, source))
    except DataError as error:
        raise DataError(f"data={data.name}: {error}") from None

    def relabel(images: ImageSplit) -> ImageSplit:
        return replace(images, labels=indices[images.labels])

    val = None if dataset.val is None else relabel(dataset.val)
    train, test = relabel(dataset.train), relabel(dataset.test)
    return ImageDataset(classes, train, val, test, dataset.layout)


def read_for_weights(
    path: Path,
    data: DataConfig,
    model: VisionTransformer,
    classes: list[str] | None,
    device: torch.device,
    typed: Collection[str],
) -> TestSet:
    """Read the data set that foreign weights are measured on.

    path: of the weights, for messages. classes: as their file names them; None: it does not.
    A folder without train/ is taken whole, unless a fraction to cut is typed. Raises DataError and
    CheckpointError as labeled_for_weights does.
    """
    if data.name in TEST_SETS or is_whole(data, typed):
        known = classes or classes_of_head(path, data, model.head.out_features)
        return read_data(data, model, known, device, typed)
    dataset = load_for_model(data, model, device, typed)
    dataset = labeled_for_weights(path, dataset, data, model.head.out_features, classes)
    return TestSet(dataset, f"data={data.name} as its own splits or cuts are")


def labeled_for_weights(
    path: Path, dataset: ImageDataset, data: DataConfig, outputs: int, classes: list[str] | None
) -> ImageDataset:
    """A data set labeled by the outputs of foreign weights: by names, or without names in order.

    path, classes: as for read_for_weights. outputs: of the head. Raises DataError for a name that
    the weights do not know, and CheckpointError where there are no names and the number differs.
    """
    if classes is not None and in_the_same_order(dataset.classes, classes):
        return dataset
    if classes is not None and not only_one_has_names(dataset.classes, classes):
        try:
            return relabeled(dataset, classes, data)
        except DataError as error:
            raise DataError(
                f"{error}; for other classes fine-tune first (train.py pretrained=…)"
            ) from None

    # The number is all that can be compared
    if len(dataset.classes) != outputs:
        raise other_head(path, data, outputs, len(dataset.classes))
    print("no names to compare: the file's classes are taken for the data set's, in order")
    return dataset


def is_whole(data: DataConfig, typed: Collection[str]) -> bool:
    """Whether foreign weights are measured on all images of a folder.

    It holds class folders: no train/, and no parquet files, whose splits are as they say.
    """
    if data.name != "folder" or data.root is None or not Path(data.root).is_dir():
        return False
    cut = {"data.val_fraction", "data.test_fraction"} & set(typed)
    if cut or find_parquet(Path(data.root)):
        return False
    return "train" not in splits_in(Path(data.root))


def classes_of_head(path: Path, data: DataConfig, count: int) -> list[str]:
    """The classes of weights that name none: ImageNet's, or as many as the folder has, sorted.

    count: outputs of the head. Raises CheckpointError where it is neither.
    """
    if count == len(imagenet_wnids()):
        print("the file names no classes: its thousand are taken for ImageNet's, in their order")
        return list(imagenet_wnids())
    if data.name in TEST_SETS:
        raise other_head(path, data, count, len(imagenet_wnids()))
    root = Path(str(data.root))
    folders = splits_in(root)
    names = class_names(folders.get("test", folders.get("val", root)))
    if len(names) != count:
        raise other_head(path, data, count, len(names))
    print("the file names no classes: they are taken for the folder's, in sorted order")
    return names


def other_head(path: Path, data: DataConfig, outputs: int, classes: int) -> CheckpointError:
    """The error for a head of another number of classes than the data set's."""
    return CheckpointError(
        f"{path}: its head has {outputs} classes, data={data.name} has {classes}; fine-tune with "
        "train.py pretrained=… first"
    )
