"""The teacher of a distillation: a trained model that is asked about every batch.

It sees the very images that the student sees, augmented and mixed, in evaluation mode and without
gradients. It belongs to no checkpoint, average or optimizer, and each process holds a whole one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from vit.data.class_folders import imagenet_wnids
from vit.data.class_matching import indices_of_names
from vit.data.preprocessing import Preprocessing, match_channels
from vit.data.splits import first_names
from vit.errors import CheckpointError
from vit.model.cost import count_macs, forward_flops
from vit.model.vision_transformer import VisionTransformer
from vit.runtime.compiling import compile_model
from vit.runtime.precision import Precision
from vit.weights.description import Weights, squash_preprocessing
from vit.weights.fitting import load_into
from vit.weights.identity import sha256_of
from vit.weights.loading import build_for


@dataclass
class Teacher:
    """A trained model of the student's classes.

    name, sha256: which one it is: what train.teacher says, and the bytes that it was read from.
    model: frozen, with the `preprocessing` it was trained with. student: how the images are
    prepared that it is given. outputs: the numbers of the student's classes among its logits,
    int64; None: all, in their order. notes: for the user, in words.
    """

    name: str
    sha256: str
    model: VisionTransformer
    student: Preprocessing
    outputs: Tensor | None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Known before anything is computed, and the same on every machine
        self.macs = count_macs(self.model)
        self.flops = forward_flops(self.model)
        # Maybe compiled
        self.forward: nn.Module = self.model

    def __call__(self, images: Tensor) -> Tensor:
        """The student's images (B, C, height, width) → logits of its classes, (B, classes)."""
        logits = self.forward(self.adapt(images))
        return logits if self.outputs is None else logits[:, self.outputs]

    def adapt(self, images: Tensor) -> Tensor:
        """Images as the student takes them → as the teacher does: size, channels, normalization.

        What augmentation has put outside of 0..1, such as the noise of erased boxes, stays there.
        """
        ours, own = self.student, self.model.preprocessing
        if takes_the_same(ours, own):
            return images
        before, after = ours.constants(images.device), own.constants(images.device)
        pixels = match_channels(images * before.std + before.mean, own.num_channels)
        if pixels.shape[-2:] != own.image_size:
            pixels = own.resize_batch(pixels)
        return (pixels - after.mean) / after.std

    def to(self, device: torch.device) -> None:
        """Move it to the device where the student is trained."""
        self.model.to(device)
        if self.outputs is not None:
            self.outputs = self.outputs.to(device)

    def compile(self, mode: bool | str, precision: Precision) -> None:
        """Compile it as the student is, see compile_model; with mode graphs without graphs.

        The next replay of a graph would overwrite the logits that the loss still needs.
        """
        mode = "blocks" if mode == "blocks" else True
        width = self.model.hidden_size
        self.forward = compile_model(self.model, mode, precision, width, run_flops=0).forward

    def identity(self) -> dict[str, str]:
        """What a checkpoint's header says of it."""
        return {"name": self.name, "sha256": self.sha256}


def takes_the_same(first: Preprocessing, second: Preprocessing) -> bool:
    """Whether two models take the same tensors: of as many pixels, normalized alike."""
    sizes = [(item.image_size, item.num_channels) for item in (first, second)]
    if sizes[0] != sizes[1]:
        return False
    # One number may stand for three equal ones
    return all(
        torch.equal(first.per_channel(mine), second.per_channel(its))
        for mine, its in ((first.mean, second.mean), (first.std, second.std))
    )


def make_teacher(
    name: str,
    weights: Weights,
    classes: Sequence[str],
    student: Preprocessing,
) -> Teacher:
    """Return the teacher of these weights, on the CPU.

    name: what train.teacher says; classes: of the data set, in the order of the labels; student:
    how its images are prepared. Raises CheckpointError, naming train.teacher, where the weights
    are of no whole model, or do not know the classes.
    """
    try:
        require_classifier(weights)
        model = build_for(weights)
        notes = list(load_into(model, weights).notes)
        outputs = outputs_for(weights, classes, notes)
        sha256 = sha256_of(weights.path, is_own=weights.header is not None)
    except CheckpointError as error:
        raise CheckpointError(f"train.teacher: {error}") from None

    if weights.preprocessing is None:
        model.preprocessing = squash_preprocessing(weights.model)
        notes.append("its file holds no normalization: mean and std 0.5 are assumed")
    notes += difference_notes(student, model.preprocessing)
    chosen = None if outputs is None else torch.tensor(outputs)
    model.eval().requires_grad_(False)
    return Teacher(name, sha256, model, student, chosen, notes)


def require_classifier(weights: Weights) -> None:
    """Raise CheckpointError where weights have no head, and so no opinion on classes."""
    if "num_classes" not in weights.model:
        raise CheckpointError(
            f"{weights.path}: holds no head, so that it knows no classes; fine-tune it first "
            "(train.py pretrained=…)"
        )


def outputs_for(weights: Weights, classes: Sequence[str], notes: list[str]) -> list[int] | None:
    """Return the numbers of the data set's classes among a teacher's outputs; None: all, in order.

    They are matched by their names; a thousand outputs without names are taken for ImageNet's, and
    others for the data set's where there are as many. Adds to the notes what is assumed. Raises
    CheckpointError where the teacher does not know a class.
    """
    count, known = weights.model["num_classes"], weights.classes
    if known is None and count == len(classes):
        notes.append("its file names no classes: they are taken for the data set's, in order")
        return None
    if known is None and count == len(imagenet_wnids()):
        known = list(imagenet_wnids())
    if known is None:
        raise CheckpointError(
            f"{weights.path}: it has {count:,} classes without names, the data set has "
            f"{len(classes):,}; fine-tune it on them first (train.py pretrained=…)"
        )
    if list(classes) == list(known):
        return None
    outputs = matched(weights.path, known, classes)
    notes.append(f"of its {count:,} classes it is asked about the data set's {len(classes):,}")
    return outputs


def matched(path: Path, known: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Return the number of every class among those that a teacher knows, by its name.

    Raises CheckpointError for a name that it does not know, or that several of its classes have.
    """
    indices = indices_of_names(known)
    unknown = [name for name in classes if len(indices.get(name, ())) != 1]
    if unknown:
        raise CheckpointError(
            f"{path}: does not know {len(unknown)} of the data set's {len(classes):,} classes by "
            f"their names: {first_names(unknown)} (it knows {first_names(list(known))}); "
            "fine-tune it on them first (train.py pretrained=…)"
        )
    return [min(indices[name]) for name in classes]


def difference_notes(student: Preprocessing, teacher: Preprocessing) -> list[str]:
    """Say what is changed about the student's images before the teacher sees them."""
    notes = []
    if student.image_size != teacher.image_size:
        sizes = [
            f"{height} x {width}" for height, width in (student.image_size, teacher.image_size)
        ]
        notes.append(f"images are resized for it from {sizes[0]} to {sizes[1]} px")
    if student.num_channels != teacher.num_channels:
        notes.append(f"images are brought to its {teacher.num_channels} channels")
    return notes
