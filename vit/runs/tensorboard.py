"""TODO: say what this file is for."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("vit")

# TensorBoard's page of chosen curves, the important ones first: {section: {title: ["Multiline", patterns of tags]}}
LAYOUT = {
    "1 the run at a glance": {
        "loss": ["Multiline", ["^loss/(train|val)$"]],
        "top-1": ["Multiline", ["^top1/(train|val)$"]],
        "learning rate": ["Multiline", ["^optimizer/learning_rate"]],
        "images per second": ["Multiline", ["^speed/images_per_second$"]],
    },
    "2 classes and layers": {
        "validation accuracy of each class": ["Multiline", ["^classes/"]],
        "gradient norm of each layer": ["Multiline", ["^gradients/"]],
    },
    "3 the machine": {
        "share of the device's rate, of time waiting for data": [
            "Multiline",
            ["^speed/MFU$", "^speed/data_wait_share$"],
        ],
        "peak memory, GiB": ["Multiline", ["^speed/peak_memory_GiB$"]],
    },
}


def quiet_writer(fault: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own; TensorBoard.attempt tells its errors of the disk, and needs no traceback."""
    if type(fault.thread).__name__ != "_AsyncWriterThread" or not isinstance(
        fault.exc_value, OSError
    ):
        threading.__excepthook__(fault)


class TensorBoard:
    """SummaryWriter that ends with one warning where the disk takes no more: curves are no reason to end a run."""

    def __init__(self, folder: Path, purge_step: int | None, writes: bool = True):
        self.folder = folder
        self.writer: SummaryWriter | None = None
        if not writes:
            return
        threading.excepthook = quiet_writer
        self.attempt(
            lambda: setattr(self, "writer", SummaryWriter(str(folder), purge_step=purge_step))
        )

    def attempt(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            self.writer = None
            log.info(
                f"warning: {self.folder} can't be written ({error.strerror or error}); TensorBoard's curves end here"
            )

    def add(self, kind: str, *arguments: Any) -> None:
        """SummaryWriter.add_<kind>(*arguments)."""
        if self.writer is not None:
            writer = self.writer
            self.attempt(lambda: getattr(writer, f"add_{kind}")(*arguments))

    def add_summary(self, summary: Any) -> None:
        if self.writer is not None and self.writer.file_writer is not None:
            file_writer = self.writer.file_writer
            self.attempt(lambda: file_writer.add_summary(summary))

    def close(self) -> None:
        if self.writer is not None:
            self.attempt(self.writer.close)
