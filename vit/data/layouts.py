"""How people lay out a folder of images: splits that hold the classes, or the classes alone."""

import os
from dataclasses import dataclass
from pathlib import Path

from vit.data.class_folders import class_names
from vit.data.image_files import is_image_file, walk_folders
from vit.data.splits import first_names
from vit.errors import DataError

# What people call the folders of the splits, in lower case; "Train" is one of them too
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}

EXPECTED = (
    "expected train/<class>/*.jpg, with val/<class>/ and test/<class>/ where you have them, "
    "or <class>/*.jpg alone"
)


@dataclass(frozen=True)
class Layout:
    """Where the class folders of each split lie.

    folders: {split: its folder}. That of train is the root itself where it holds the class folders
    and no splits. A split that has to be cut from train has none.
    """

    root: Path
    folders: dict[str, Path]

    @property
    def is_flat(self) -> bool:
        """Whether the root holds the class folders themselves."""
        return self.folders["train"] == self.root

    def title(self, split: str) -> str:
        """The split's name for people, such as "pets validation"."""
        name = folder_name(self.root)
        return name if self.is_flat else f"{name} {self.folders[split].name}"

    def describe(self) -> str:
        """What was found, in one line for the screen."""
        name = folder_name(self.root)
        if not self.is_flat:
            *others, last = [f"{folder.name}/" for folder in self.folders.values()]
            return f"{name} holds {', '.join(others)} and {last}" if others else f"{name}/{last}"

        classes = class_names(self.root)
        text = (
            f"{name} has no train/: its {len(classes)} class folders ({first_names(classes)}) are "
            "taken as train, and what is held out is cut from them"
        )
        loose = count_images_in(self.root)
        if loose:
            text += f"; {loose:,} images outside of these folders are left out"
        return text


def split_of(name: str) -> str | None:
    """The split that people mean by this name, or None: val for "Validation"."""
    lower = name.lower()
    return next((split for split, names in SPLIT_FOLDERS.items() if lower in names), None)


def folder_name(folder: Path) -> str:
    """The name of a folder, also where it is given as "." or "..", which have none."""
    return Path(os.path.abspath(folder)).name or str(folder)


def find_layout(root: Path) -> Layout:
    """Find the splits of a folder of images, or the class folders that have none.

    Raises DataError where the folders can be understood in more than one way, or in none.
    """
    if not os.path.isdir(root):
        raise DataError(f"{root.absolute()}: no such folder, or it may not be opened; {EXPECTED}")
    folders, others = find_splits(root)
    if "train" in folders:
        require_no_classes_beside(folders["train"], others)
        return Layout(root, folders)
    if folders:
        held_out = next(iter(folders.values()))
        raise DataError(
            f"{root.absolute()}: holds {held_out.name}/ but no train/; {EXPECTED} (a class that "
            "is called like a split needs another name)"
        )
    require_classes(root, others)
    return Layout(root, {"train": root})


def find_splits(root: Path) -> tuple[dict[str, Path], list[Path]]:
    """({split: its folder} of the splits that there are, the other folders of the root).

    Raises DataError where two folders can be the same split.
    """
    names = class_names(root)
    found = {split: split_folder(root, split, names) for split in SPLIT_FOLDERS}
    folders = {split: folder for split, folder in found.items() if folder is not None}
    return folders, [root / name for name in names if root / name not in folders.values()]


def split_folder(root: Path, split: str, names: list[str]) -> Path | None:
    """The folder of a split among the folders of the root. Raises DataError where there are two."""
    matches = [name for name in names if name.lower() in SPLIT_FOLDERS[split]]
    if len(matches) > 1:
        both = " and ".join(f"{name}/" for name in matches)
        raise DataError(
            f"{root.absolute()}: {both} can each be the {split} split; keep one of them there"
        )
    return root / matches[0] if matches else None


def require_no_classes_beside(train: Path, others: list[Path]) -> None:
    """Raise DataError where folders of images lie beside train, which may be classes too."""
    # Other folders, such as one of annotations, do no harm
    classes = [folder.name for folder in others if holds_images(folder)]
    if classes:
        raise DataError(
            f"{train.parent.absolute()}: {train.name}/ and other folders of images "
            f"({first_names(classes)}) lie side by side, so it is not clear what to train on; "
            f"move these into {train.name}/, or away"
        )


def require_classes(root: Path, folders: list[Path]) -> None:
    """Raise DataError where the folders of a root without splits can't be classes."""
    if len(folders) > 1:
        return
    if not folders and count_images_in(root):
        problem = "holds images, but no folders that would say which class they are of"
    elif not folders:
        problem = "holds no folders of images"
    else:
        # Archives often unpack to one folder more
        problem = f"holds one folder alone, {folders[0].name}/, and there must be two classes"
        if len(class_names(folders[0])) > 1:
            problem += f" (is it data.root={folders[0]} that you mean?)"
    raise DataError(f"{root.absolute()}: {problem}; {EXPECTED}")


def holds_images(folder: Path) -> bool:
    """Whether there is an image file in a folder, at any depth, in what of it can be read."""
    return any(is_image_file(name) for _, names in walk_folders(folder) for name in names)


def count_images_in(folder: Path) -> int:
    """How many image files lie directly in a folder."""
    return sum(is_image_file(entry.name) and entry.is_file() for entry in os.scandir(folder))
