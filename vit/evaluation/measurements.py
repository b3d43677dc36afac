"""What evaluate.py measures of a restored model beyond loss and accuracy: calibration, nearest neighbours, corruptions."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit.data.loader import evaluation_batches
from vit.data.splits import ImageSplit
from vit.errors import CheckpointError, ConfigError
from vit.evaluation.accuracy import evaluate, wilson_interval
from vit.evaluation.corruptions import MAX_SIDE, SEVERITIES, corrupt
from vit.evaluation.metrics import (
    confusion_matrix,
    fit_temperature,
    nearest_neighbours,
    negative_log_likelihood,
    per_class,
    reliability,
)
from vit.evaluation.restore import RestoredModel
from vit.model.vision_transformer import VisionTransformer

NEIGHBOURS, NEIGHBOUR_TEMPERATURE = (
    20,
    0.07,
)  # Wu et al. 2018 vote with 200 of ImageNet's; 20 suit small data sets too


BINS = 15  # of confidence, as in Guo et al. 2017


@dataclass
class RecordedOutputs:
    """What a model computed for a split, batch after batch, on the CPU: logits float32 (B, C), and the head's inputs, the
    pooled features, float32 (B, D), where they are wanted."""

    logit_batches: list[Tensor] = field(default_factory=list)
    feature_batches: list[Tensor] = field(default_factory=list)

    @property
    def logits(self) -> Tensor:
        return torch.cat(self.logit_batches)

    @property
    def features(self) -> Tensor:
        return torch.cat(self.feature_batches)


@contextlib.contextmanager
def record_outputs(
    model: VisionTransformer, logits: bool, features: bool
) -> Iterator[RecordedOutputs]:
    """Within: every forward pass of the model is kept, so that one pass over a split serves all measurements. The memory is
    n × (C + D) float32; nothing is kept of what is not wanted."""
    record = RecordedOutputs()

    def keep_logits(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        record.logit_batches.append(output.detach().float().cpu())

    def keep_features(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        record.feature_batches.append(inputs[0].detach().float().cpu())

    handles = [model.register_forward_hook(keep_logits)] if logits else []
    handles += [model.head.register_forward_pre_hook(keep_features)] if features else []
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def check_possible(
    restored: RestoredModel, images: ImageSplit, split: str, knn: bool, corruptions: bool
) -> None:
    """Raise ConfigError for what can't be measured, before anything is."""
    if knn and split == "train":
        raise ConfigError(
            "knn=true looks for neighbours in train, where with split=train every image would find itself; use "
            "split=val or split=test"
        )
    size = (
        restored.model.preprocessing.image_size
        if images.pixels is None
        else tuple(images.pixels.shape[-2:])
    )
    if corruptions and max(size) > MAX_SIDE:
        raise ConfigError(
            f"corruptions=true is for small pictures, of at most {MAX_SIDE} px: its strengths would hardly be "
            f"seen in those of {images.title}, {size[0]} x {size[1]} px; leave it out"
        )


@dataclass(frozen=True)
class HeldOut:
    """The logits and labels of the validation split, that the temperature is fitted on. same: it is the split measured."""

    logits: Tensor
    labels: Tensor
    images: ImageSplit
    same: bool


def measure_held_out(
    restored: RestoredModel, split: str, logits: Tensor, workers: int
) -> HeldOut | None:
    """None where nothing is held out of train. logits: of the split measured, in case it is val itself."""
    images = restored.data.val
    if images is None:
        return None
    if split != "val":
        with record_outputs(restored.model, logits=True, features=False) as record:
            restored.measure(restored.model, "val", workers)
        logits = record.logits
    return HeldOut(logits, images.labels, images, split == "val")


def calibration(
    logits: Tensor, labels: Tensor, held_out: HeldOut | None, source: Path
) -> dict[str, Any]:
    """nll (nats) and ece of the logits as they are, macro_f1, and where something is held out the temperature fitted there with
    nll and ece of the logits divided by it. Raises CheckpointError where logits are not finite."""
    if not logits.isfinite().all():
        raise CheckpointError(
            f"{source}: some of the model's outputs are not finite numbers, so nothing can be told of them; "
            "evaluate without report=true, or train again at a lower optimizer.lr"
        )
    confusion = confusion_matrix(logits.argmax(dim=1), labels, logits.shape[1])
    found: dict[str, Any] = {
        "macro_f1": per_class(confusion).macro_f1(),
        "nll": negative_log_likelihood(logits, labels),
        "ece": reliability(logits, labels, BINS).expected_calibration_error(),
        "temperature": None,
    }
    if held_out is not None:
        temperature = fit_temperature(held_out.logits, held_out.labels)
        found |= {
            "temperature": temperature,
            "nll_at_temperature": negative_log_likelihood(logits, labels, temperature),
            "ece_at_temperature": reliability(
                logits, labels, BINS, temperature
            ).expected_calibration_error(),
        }
    return found


def measure_neighbours(
    restored: RestoredModel, features: Tensor, labels: Tensor, workers: int
) -> dict[str, Any]:
    """knn_top1, its interval, and what the bank was: k-NN accuracy of the pooled features, neighbours from train, as
    evaluation sees it. features: of the images measured."""
    with record_outputs(restored.model, logits=False, features=True) as bank:
        restored.measure(restored.model, "train", workers)
    device, train = restored.precision.device, restored.data.train
    predicted = nearest_neighbours(
        features.to(device),
        bank.features.to(device),
        train.labels.to(device),
        len(restored.data.classes),
        NEIGHBOURS,
        NEIGHBOUR_TEMPERATURE,
    ).cpu()
    top1 = (predicted == labels).double().mean().item()
    return {
        "knn_top1": top1,
        "knn_top1_interval_95": list(wilson_interval(top1, len(labels))),
        "knn_bank": str(train),
    }


def small_pictures(restored: RestoredModel, images: ImageSplit, workers: int) -> ImageSplit:
    """With uint8 pixels on the CPU: those of a small data set as they are, files at the size the model sees."""
    if images.pixels is not None:
        return images.to(torch.device("cpu"))
    preprocessing = restored.model.preprocessing
    batches = evaluation_batches(
        images, restored.config.train.batch_size, preprocessing, workers, torch.device("cpu")
    )
    pixels = torch.cat(
        [(preprocessing.denormalize(inputs) * 255).round().to(torch.uint8) for inputs, _ in batches]
    )
    return replace(images, pixels=pixels, paths=None)


def measure_corruptions(
    restored: RestoredModel, images: ImageSplit, workers: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """{"corruptions_top1": the mean over all, "corruptions": {kind: top-1 at severity 1 to 5}}. tell: gets a line a kind."""
    small = small_pictures(restored, images, workers)
    assert small.pixels is not None
    device, preprocessing = restored.precision.device, restored.model.preprocessing
    found: dict[str, list[float]] = {}
    for kind in SEVERITIES:
        found[kind] = []
        for severity in range(1, 6):
            worse = replace(small, pixels=corrupt(small.pixels, kind, severity))
            batches = evaluation_batches(
                worse, restored.config.train.batch_size, preprocessing, 0, device
            )
            found[kind].append(evaluate(restored.model, batches, restored.precision)["top1"])
        tell(f"{kind}: top-1 {', '.join(f'{top1:.1%}' for top1 in found[kind])} at severity 1 to 5")
    every = [top1 for row in found.values() for top1 in row]
    return {"corruptions_top1": sum(every) / len(every), "corruptions": found}


@dataclass(frozen=True)
class Measured:
    """run: the checkpoint's run folder, None where it lies in none. logits: float32 (n, C) on the CPU, in the order of images.
    held_out: None where nothing was. found: what evaluation.json holds."""

    path: Path
    run: Path | None
    restored: RestoredModel
    images: ImageSplit
    logits: Tensor
    held_out: HeldOut | None
    found: dict[str, Any]
