"""The images of data=folder: what data.root is decides how they are listed."""

import os
from pathlib import Path

from vit.data.class_folders import list_class_folders, list_same_classes
from vit.data.copies import describe_copies
from vit.data.image_files import describe_unsupported
from vit.data.layouts import find_layout
from vit.data.parquet_index import find_parquet, list_parquet
from vit.data.splits import Splits
from vit.data.tables import is_table, list_table
from vit.errors import ConfigError, DataError


def list_images(root: Path, label_column: str | None = None) -> Splits:
    """The classes and splits of a folder of class folders, a table, or parquet files.

    label_column: of a table or of parquet files, the name of the column with the classes; None: it
    is found by its name.

    Raises DataError, naming what is wrong, and ConfigError for a label_column that does nothing.
    """
    if is_table(root):
        return list_table(root, label_column)
    files = find_parquet(root)
    if files:
        return list_parquet(root, files, label_column)
    if os.path.isfile(root):
        raise DataError(
            f"{root.absolute()}: neither a folder nor a .csv, .tsv or .parquet file; an archive is "
            f"unpacked by python -m vit.unpack {root} FOLDER"
        )
    if label_column is not None:
        raise ConfigError(
            f"data.label_column does nothing here: the folders of {root} are the classes; leave "
            "it out"
        )
    return list_folders(root)


def list_folders(root: Path) -> Splits:
    """Images in folders, as vit.data.layouts finds them: with splits, or the classes alone."""
    layout = find_layout(root)
    unsupported: list[str] = []
    classes, train = list_class_folders(layout.folders["train"], layout.title("train"), unsupported)
    others = {
        split: list_same_classes(folder, classes, layout.title(split), unsupported)
        for split, folder in layout.folders.items()
        if split != "train"
    }
    found = layout.describe()
    if unsupported:
        found += f"; {describe_unsupported(unsupported)}"
    copies = [describe_copies(train, images) for images in others.values()]
    found += "".join(f"; {text}" for text in copies if text)
    return Splits(classes, train, **others, layout=found)
