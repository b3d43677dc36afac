"""TensorBoard: curves, images and tables of a run."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid

from vit.text import markdown_table

log = logging.getLogger("vit")

# Pixels that small images are enlarged to
MIN_SIDE = 64

# TensorBoard's page of chosen curves, the important ones first, as its custom_scalars plugin takes
# it: {section: {title: ["Multiline", patterns of tags]}}
LAYOUT = {
    "1 the run at a glance": {
        "loss": ["Multiline", ["^loss/(train|val)$"]],
        "top-1": ["Multiline", ["^(top1|balanced_top1|macro_f1)/(train|val)$"]],
        "learning rate": ["Multiline", ["^optimizer/learning_rate"]],
        "images per second": ["Multiline", ["^speed/images_per_second$"]],
    },
    "2 classes and layers": {
        "validation accuracy of each class": ["Multiline", ["^classes/"]],
        "gradient norm of each layer": ["Multiline", ["^gradients/"]],
    },
    "3 the machine": {
        "MFU, fraction of time waiting for data": [
            "Multiline",
            ["^speed/MFU$", "^speed/data_wait_share$"],
        ],
        "peak memory, GiB": ["Multiline", ["^speed/peak_memory_GiB$"]],
    },
}


class TensorBoard:
    """A SummaryWriter that ends with one warning where the disk can't be written to.

    Curves are no reason to end a run. purge_step: of a resumed run, from which on curves written
    before are dropped; writes: false in all but the first of several processes.
    """

    def __init__(self, folder: Path, purge_step: int | None, writes: bool = True):
        self.folder = folder
        self.writer: SummaryWriter | None = None
        if not writes:
            return

        # The writer's thread prints the tracebacks of its own errors
        threading.excepthook = ignore_disk_errors_of_writer
        with self.disk_errors_end_it():
            self.writer = SummaryWriter(str(folder), purge_step=purge_step)
            self.writer.add_custom_scalars(LAYOUT)

    @property
    def active(self) -> bool:
        return self.writer is not None

    @contextlib.contextmanager
    def disk_errors_end_it(self) -> Iterator[None]:
        """Warn of an OSError in the block, and write nothing from then on."""
        try:
            yield
        except OSError as error:
            # Without the writer every later call does nothing, so there is one warning
            self.writer = None
            reason = error.strerror or error
            log.info(
                f"warning: {self.folder} can't be written ({reason}); TensorBoard's curves end here"
            )

    def scalar(self, tag: str, value: float, step: int) -> None:
        if self.writer is not None:
            with self.disk_errors_end_it():
                self.writer.add_scalar(tag, value, step)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        if self.writer is not None:
            with self.disk_errors_end_it():
                self.writer.add_histogram(tag, values, step)

    def image(self, tag: str, image: Tensor, step: int) -> None:
        """Show an image (3, height, width), floats in 0..1 or uint8."""
        if self.writer is not None:
            with self.disk_errors_end_it():
                self.writer.add_image(tag, image, step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        if self.writer is not None:
            with self.disk_errors_end_it():
                self.writer.add_text(tag, markdown, step)

    def training_images(self, images: Tensor, labels: list[str], step: int) -> None:
        """Show images as the model sees them, and a table of their labels.

        images: floats in 0..1 (B, C, height, width); labels: one text an image.
        """
        images = images.cpu()
        side = max(images.shape[-2:])
        # Without smoothing: a person should see the pixels
        if side < MIN_SIDE:
            images = F.interpolate(images, scale_factor=MIN_SIDE // side)
        columns = 8
        grid = make_grid(images, nrow=columns, padding=2, pad_value=1.0)
        self.image("pictures/training images", grid, step)

        # The labels in the same rows and columns, since the grid has no text
        rows = [labels[start : start + columns] for start in range(0, len(labels), columns)]
        table = markdown_table([[""] * columns, *(pad(row, columns) for row in rows)])
        self.text("pictures/labels of the training images", table, step)

    def hyperparameters(
        self, settings: dict[str, Any], results: dict[str, float], step: int
    ) -> None:
        """Write a run's row of the HPARAMS page.

        settings: {key: value}; results: {tag: value}, also written as scalars, which the page
        reads.
        """
        # Only these types are allowed there
        plain = {}
        for key, value in settings.items():
            plain[key] = value if isinstance(value, bool | int | float | str) else str(value)

        # SummaryWriter.add_hparams would write them into a folder of their own, apart from the
        # run's curves
        for summary in hparams(plain, results):
            self.summary(summary)
        for tag, value in results.items():
            self.scalar(tag, value, step)

    def summary(self, summary: Any) -> None:
        if self.writer is not None and self.writer.file_writer is not None:
            with self.disk_errors_end_it():
                self.writer.file_writer.add_summary(summary)

    def close(self) -> None:
        if self.writer is not None:
            with self.disk_errors_end_it():
                self.writer.close()


def pad(row: list[str], length: int) -> list[str]:
    return row + [""] * (length - len(row))


def ignore_disk_errors_of_writer(fault: threading.ExceptHookArgs) -> None:
    """Print an exception of a thread as Python does, but for disk errors of TensorBoard's writer.

    They need no traceback, since the next write raises the error again where it is handled.
    """
    of_writer = isinstance(fault.thread, _AsyncWriterThread)
    if not (of_writer and isinstance(fault.exc_value, OSError)):
        threading.__excepthook__(fault)
