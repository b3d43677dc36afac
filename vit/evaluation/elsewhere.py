"""A model that is judged on other images than those of its run: evaluate.py with data=NAME.

The run's own data set gives the run's own cut, so that no training image is measured as test. A
folder of another data set is taken whole.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vit.checkpoints.file import require_header_keys
from vit.checkpoints.model import load_with_header
from vit.config.config import Config, from_dict, group_to_dict
from vit.config.data import DataConfig
from vit.config.settings import check_ranges
from vit.data.datasets import DATASETS
from vit.data.preprocessing import Preprocessing
from vit.data.splits import ImageDataset
from vit.errors import ConfigError, DataError
from vit.evaluation.resolution import with_changed_input
from vit.evaluation.restore import (
    RestoredModel,
    default_batch_size,
    require_data,
    restore_loaded,
)
from vit.evaluation.test_data import load_for_model, protocol_of, read_data
from vit.model.vision_transformer import VisionTransformer
from vit.runtime.precision import choose_precision


def restore_elsewhere(
    path: Path,
    data: dict[str, Any],
    changes: dict[str, Any],
    device: torch.device,
    precision: str | None = None,
    batch_size: int | None = None,
) -> RestoredModel:
    """Restore a best checkpoint of this project on a data set that is named anew.

    data: the group `data`, with a name. changes: {key: value} of the command line.
    precision, batch_size: as for restore().

    Raises CheckpointError, ConfigError or DataError as restore() does, and where a class is not one
    of the model's, or images of the folder are some that the run was trained on.
    """
    model, header = load_with_header(path)
    require_data(path, header)
    run = from_dict(header["config"], str(path))
    given = DataConfig(**group_to_dict("data", DataConfig, data))
    if is_of_the_run(given, run, model, header, device, typed="data.root" in changes):
        # The group's file may give another root than the run's
        typed = {key: value for key, value in changes.items() if key != "data"}
        return restore_loaded(path, model, header, typed, device, precision, batch_size)

    config = replace(run, data=given)
    check_ranges(config, changes)
    model = with_changed_input(model, header["config"]["model"], changes)
    test_set = read_data(given, model, model.classes, device, changes)
    refuse_training_images(test_set.data, given, run, model, device)
    trained_in = require_header_keys(header, path, "precision")["precision"]
    return RestoredModel(
        model=model.to(device),
        header=header,
        config=replace(config, data=as_the_model_knows(given, run.data, model.preprocessing)),
        data=test_set.data,
        precision=choose_precision(precision or trained_in, device, model.hidden_size),
        batch_size=batch_size or default_batch_size(config.train),
        protocol=protocol_of(test_set),
    )


def as_the_model_knows(
    data: DataConfig, of_run: DataConfig, preprocessing: Preprocessing
) -> DataConfig:
    """The group `data` with what the model brings: the preprocessing, and whether to mirror.

    of_run: the group of the run.
    """
    return replace(
        data,
        mean=list(preprocessing.mean),
        std=list(preprocessing.std),
        eval_crop=preprocessing.eval_crop,
        interpolation=preprocessing.interpolation,
        # Neither may be mirrored: what the model has learned to tell apart, nor what it is shown
        mirror=data.mirror and of_run.mirror,
    )


def is_of_the_run(
    given: DataConfig,
    run: Config,
    model: VisionTransformer,
    header: dict[str, Any],
    device: torch.device,
    typed: bool,
) -> bool:
    """Whether a data set is the one that the run was trained on, so that its cut is the run's.

    typed: whether data.root is. A folder is the run's where it lies at the same place, or where its
    training images are the run's, by their checksum.
    """
    if given.name != run.data.name:
        return False
    if given.name != "folder" or not typed or given.root is None:
        return True
    if run.data.root is not None and os.path.realpath(given.root) == os.path.realpath(
        run.data.root
    ):
        return True
    try:
        moved = load_for_model(replace(run.data, root=given.root), model, device)
    except (ConfigError, DataError):
        # It lacks train/, for example, or the table in which the run's data.label_column was
        return False
    return header.get("data") == moved.train.fingerprint()


def refuse_training_images(
    data: ImageDataset,
    given: DataConfig,
    run: Config,
    model: VisionTransformer,
    device: torch.device,
) -> None:
    """Raise DataError where test images are files that the run was trained on.

    Files are known by their place, to which links are followed: a copy elsewhere can't be told from
    other images. Raises DataError as well where the folder may hold training images, but the run's
    own images can't be listed any more.
    """
    # What is not there any more has no images in common with anything
    if data.test.paths is None or not reads_image_files(run.data):
        return
    if not os.path.exists(str(run.data.root)):
        return
    try:
        own = load_for_model(run.data, model, device)
    except (ConfigError, DataError) as error:
        if overlap(given.root, run.data.root):
            raise DataError(
                f"data.root={given.root}: may hold training images of the run, whose own data set "
                f"is not as it was ({error})"
            ) from None
        print(f"warning: training images of the run can't be told any more ({error})")
        return
    assert own.train.paths is not None
    tested = list(real_paths(data.test.paths))
    trained_on = set(tested).intersection(real_paths(own.train.paths))
    shared = sum(path in trained_on for path in tested)
    if shared:
        raise DataError(
            f"data.root={given.root}: {shared:,} of these {len(data.test):,} images are training "
            "images of the run; checkpoint=FILE without data=… measures the images that were held "
            "out"
        )


def reads_image_files(data: DataConfig) -> bool:
    """Whether images are files of their own, which other folders may hold or link to too."""
    reader = DATASETS.get(data.name)
    return reader is not None and reader.reads_files and data.name != "shards"


def real_paths(paths: np.ndarray) -> Iterator[str]:
    """Where each image lies, without links. paths: bytes (n,), see ImageSplit.

    Each folder is resolved and listed once: on a network disk that is much faster than a look at
    each file.
    """
    folders: dict[str, tuple[str, set[str]]] = {}
    for path in map(os.fsdecode, paths.tolist()):
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = (os.path.realpath(folder), links_in(folder))
        real_folder, links = folders[folder]
        yield os.path.realpath(path) if name in links else os.path.join(real_folder, name)


def links_in(folder: str) -> set[str]:
    """The names of the links in a folder, none where it can't be listed."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_symlink()}
    except OSError:
        return set()


def overlap(given: str | None, own: str | None) -> bool:
    """Whether a folder and the run's own lie in one another or are the same.

    own: a folder, or a table or parquet file, whose images are most likely beside it.
    """
    if given is None or own is None:
        return False
    own_folder = own if os.path.isdir(own) else os.path.dirname(own)
    paths = [os.path.realpath(given), os.path.realpath(own_folder)]
    return os.path.commonpath(paths) in paths
