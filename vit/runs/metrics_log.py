"""What a run says while it trains: the screen, metrics.jsonl, timing.jsonl and TensorBoard."""

import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid
from tqdm import tqdm

from vit.files import truncate_after_step
from vit.runs.tensorboard import LAYOUT, TensorBoard
from vit.text import format_duration

log = logging.getLogger("vit")


SECONDS_BETWEEN_LOOKS = 1  # at the numbers, for the bar


SECONDS_BETWEEN_LINES = 30  # where there is no bar


def screen(line: str) -> None:
    """A line on standard output, above the bar where there is one."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


class Tracker:
    """Writes a run's numbers; `step` counts finished optimizer steps.

    metrics.jsonl holds what a repeated run would write again to the bit; what depends on the clock goes to timing.jsonl.
    On a resume all three files are cut back to first_step. writes: false in all but the first of several processes; they
    compute the same numbers.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        total_steps: int,
        steps_per_epoch: float,
        batch_size: int,
        resuming: bool = False,
        writes: bool = True,
    ):
        self.writes = writes
        for name in ("metrics.jsonl", "timing.jsonl") if writes else ():
            truncate_after_step(folder / name, first_step)
        self.metrics_file = open(
            folder / "metrics.jsonl" if writes else os.devnull, "a", buffering=1
        )  # noqa: SIM115
        self.timing_file = open(folder / "timing.jsonl" if writes else os.devnull, "a", buffering=1)  # noqa: SIM115
        self.board = TensorBoard(
            folder / "tensorboard", first_step + 1 if resuming else None, writes
        )
        self.board.add("custom_scalars", LAYOUT)
        self.total_steps, self.steps_per_epoch, self.batch_size = (
            total_steps,
            steps_per_epoch,
            batch_size,
        )
        self.first_step = first_step
        self.started = self.last_shown = time.monotonic()
        self.bar: tqdm | None = None
        self.latest = ""  # numbers of the last steps, for a person

    def epoch(self, step: int) -> int:
        """The epoch, counted from 1, that the step after `step` belongs to."""
        return int(step / self.steps_per_epoch) + 1

    def epochs(self) -> int:
        return max(1, round(self.total_steps / self.steps_per_epoch))

    def advance(self, step: int) -> None:
        """Move the bar; called after every step, and costs nothing where output is no terminal."""
        if not (self.writes and sys.stderr.isatty()):
            return
        begin = int((self.epoch(step - 1) - 1) * self.steps_per_epoch)
        if self.bar is None:
            end = min(self.total_steps, int(self.epoch(step - 1) * self.steps_per_epoch))
            self.bar = tqdm(
                total=(end - begin) * self.batch_size,
                initial=(step - 1 - begin) * self.batch_size,
                unit=" img",
                desc=f"epoch {self.epoch(step - 1)}/{self.epochs()}",
                leave=False,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {rate_fmt}, {remaining} left{postfix}",
            )
        self.bar.update(self.batch_size)
        if self.epoch(step) != self.epoch(step - 1):
            self.close_bar()

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def write_metrics(self, step: int, split: str, **values: float) -> None:
        self.metrics_file.write(json.dumps({"step": step, "split": split, **values}) + "\n")

    def train(
        self,
        step: int,
        *,
        loss: float,
        top1: float,
        learning_rates: dict[str, float],
        grad_norm: float,
        images_per_second: float,
        mfu: float,
        data_wait: float,
        memory: int,
    ) -> None:
        """Means over the steps since the last call; top1 NaN: unknown, since images are mixed; learning_rates: of each group
        of parameters; mfu: the share of the device's matrix-product rate; data_wait: of the time spent waiting for batches."""
        learning_rate = max(learning_rates.values())
        known = {"loss": loss} if math.isnan(top1) else {"loss": loss, "top1": top1}
        self.write_metrics(step, "train", **known, lr=learning_rate, grad_norm=grad_norm)
        self.timing_file.write(
            json.dumps(
                {
                    "step": step,
                    "images_per_second": round(images_per_second, 2),
                    "mfu": round(mfu, 4),
                    "data_wait": round(data_wait, 4),
                    "memory_bytes": memory,
                }
            )
            + "\n"
        )
        several = learning_rates if len(set(learning_rates.values())) > 1 else {}
        for tag, value in {
            **{f"{name}/train": value for name, value in known.items()},
            "optimizer/learning_rate": learning_rate,
            "optimizer/gradient_norm": grad_norm,
            **{f"optimizer/learning_rate/{name}": rate for name, rate in several.items()},
            "speed/images_per_second": images_per_second,
            "speed/MFU": mfu,
            "speed/data_wait_share": data_wait,
            "speed/peak_memory_GiB": memory / 2**30,
            "optimizer/epoch": step / self.steps_per_epoch,
        }.items():
            self.board.add("scalar", tag, value, step)
        self.latest = self.told(loss, top1, images_per_second, mfu)

    @staticmethod
    def told(loss: float, top1: float, images_per_second: float, mfu: float) -> str:
        return (
            f"loss {loss:.3f}"
            + ("" if math.isnan(top1) else f"  top-1 {top1:.1%}")
            + f"  {images_per_second:.0f} img/s  MFU {mfu:.0%}"
        )

    def wants_numbers(self) -> bool:
        """Whether it is time to show the numbers of the last steps: reading them makes the device wait."""
        return time.monotonic() - self.last_shown > (
            SECONDS_BETWEEN_LOOKS if self.bar is not None else SECONDS_BETWEEN_LINES
        )

    def show(
        self,
        step: int,
        loss: float,
        top1: float,
        grad_norm: float,
        images_per_second: float,
        mfu: float,
    ) -> None:
        self.latest = self.told(loss, top1, images_per_second, mfu)
        self.last_shown = time.monotonic()
        if self.bar is not None:
            known = "" if math.isnan(top1) else f", top-1 {top1:.1%}"
            self.bar.set_postfix_str(f"loss {loss:.3f}{known}, MFU {mfu:.0%}")
        else:
            self.line(step)

    def line(self, step: int, told: str = "") -> None:
        """One plain line: where training stands, its latest numbers, and what `told` adds."""
        self.last_shown = time.monotonic()
        log.info(
            f"epoch {min(step / self.steps_per_epoch, self.epochs()):5.1f}/{self.epochs()}  step {step}  "
            f"{self.latest}{told}  {format_duration(self.seconds_left(step))} left"
        )

    def seconds_left(self, step: int) -> float:
        """From the speed of this process so far, evaluations included."""
        done = step - self.first_step
        return (
            (time.monotonic() - self.started) / done * (self.total_steps - step)
            if done > 0
            else 0.0
        )

    def evaluation(self, step: int, split: str, metrics: dict[str, float]) -> None:
        values = {name: metrics[name] for name in ("n", "loss", "top1", "top5")}
        self.write_metrics(step, split, **values)
        for name in (
            ("loss", "top1", "top5") if split == "val" else ()
        ):  # a single point of test is no curve
            self.board.add("scalar", f"{name}/{split}", metrics[name], step)

    def text(self, tag: str, markdown: str) -> None:
        self.board.add("text", tag, markdown, 0)

    def pictures(self, pictures: Tensor, labels: list[str], step: int) -> None:
        """A grid of training images as the model sees them, floats in 0..1 (B, C, height, width), and their labels beside."""
        pictures = pictures.cpu()
        if (
            max(pictures.shape[-2:]) < 64
        ):  # small images are enlarged without smoothing: a person should see the pixels
            pictures = torch.nn.functional.interpolate(
                pictures, scale_factor=64 // max(pictures.shape[-2:])
            )
        self.board.add(
            "image",
            "pictures/training images",
            make_grid(pictures, nrow=8, padding=2, pad_value=1.0),
            step,
        )
        rows = [labels[start : start + 8] for start in range(0, len(labels), 8)]
        table = ["|" * 9, "|" + "---|" * 8] + ["| " + " | ".join(row) + " |" for row in rows]
        self.board.add("text", "pictures/labels of the training images", "\n".join(table), step)

    def attention(self, figure: Tensor, step: int) -> None:
        """A picture of attention maps (vit.attention.attention_figure), floats in 0..1 (3, height, width)."""
        self.board.add("image", "pictures/attention on validation images", figure, step)

    def hyperparameters(self, parameters: dict[str, Any], results: dict[str, float | None]) -> None:
        """One row of TensorBoard's HPARAMS page, in the run's own folder so that it stands beside its curves."""
        metrics = {tag: value for tag, value in results.items() if value is not None}
        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in parameters.items()
        }
        for summary in hparams(plain, metrics):
            self.board.add_summary(summary)
        for tag, value in metrics.items():
            self.board.add("scalar", tag, value, self.total_steps)

    def close(self) -> None:
        self.close_bar()
        self.board.close()
        self.metrics_file.close()
        self.timing_file.close()
