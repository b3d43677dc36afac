"""What evaluate.py measures: accuracy always, and what is asked for by a key of its own.

A measurement is a function from a MeasuredModel to numbers for evaluation.json and a line for the
screen. To add one, write the function, enter it in MEASUREMENTS under its key, and add the key to
EvaluateConfig and to conf/evaluate.yaml.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit.data.class_balance import are_unbalanced, largest_share
from vit.data.loader import evaluation_batches
from vit.data.splits import ImageSplit
from vit.errors import CheckpointError, ConfigError
from vit.evaluation.accuracy import wilson_interval
from vit.evaluation.corruptions import CORRUPTIONS, MAX_SIDE, NUM_SEVERITIES, corrupt
from vit.evaluation.metrics import (
    fit_temperature,
    nearest_neighbors,
    negative_log_likelihood,
    reliability,
    top_of_answers,
)
from vit.evaluation.protocol import CROPPED, MIRRORED, Judge, protocol_line
from vit.evaluation.restore import RestoredModel
from vit.model.vision_transformer import VisionTransformer

# Wu et al. 2018 let 200 images of ImageNet vote; 20 suit small data sets too
NUM_NEIGHBORS = 20
NEIGHBOR_TEMPERATURE = 0.07

# Of confidence, as in Guo et al. 2017
CALIBRATION_BINS = 15

# Numbers for evaluation.json, and a line for the screen
Result = tuple[dict[str, Any], str]


@dataclass
class RecordedOutputs:
    """What a model computed for a split, batch after batch, float32 on the CPU.

    logit_batches: (B, C) each.
    feature_batches: the head's inputs, the pooled features, (B, D) each.
    latest: {"logits", "features"} of the last forward pass, not kept yet.
    """

    logit_batches: list[Tensor] = field(default_factory=list)
    feature_batches: list[Tensor] = field(default_factory=list)
    latest: dict[str, Tensor] = field(default_factory=dict)

    def keep(self) -> None:
        """Keep what the last forward pass gave, once its images have been counted."""
        if "logits" in self.latest:
            self.logit_batches.append(self.latest["logits"].float().cpu())
        if "features" in self.latest:
            self.feature_batches.append(self.latest["features"].float().cpu())
        self.latest.clear()

    @property
    def logits(self) -> Tensor:
        """(n, C), in the order of the split's images."""
        return torch.cat(self.logit_batches)

    @property
    def features(self) -> Tensor:
        """(n, D), in the order of the split's images."""
        return torch.cat(self.feature_batches)


@contextlib.contextmanager
def record_outputs(
    model: VisionTransformer | Judge, logits: bool = False, features: bool = False
) -> Iterator[RecordedOutputs]:
    """Within the block, note what the model computes, so that one pass serves all measurements.

    The record's keep() has to be called after every forward pass that counts: one that runs out of
    memory is made again. The memory is n x (C + D) float32; nothing is kept of what is not asked
    for.
    """
    record = RecordedOutputs()

    def note_logits(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        record.latest["logits"] = output.detach()

    def note_features(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        record.latest["features"] = inputs[0].detach()

    # Hooks, so that the model's forward pass needs no flag for this
    handles = []
    if logits:
        handles.append(model.register_forward_hook(note_logits))
    if features:
        handles.append(model.head.register_forward_pre_hook(note_features))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class MeasuredModel:
    """A restored model and the split it is measured on.

    path: its file. split: train, val or test. workers: processes that decode image files.
    source: what the file was asked for by, a path or a name of the network; None: its path.
    outputs: what the model computed for the images, as far as a measurement needs it; empty before
    measure_accuracy.
    """

    path: Path
    restored: RestoredModel
    split: str
    workers: int
    source: str | None = None
    outputs: RecordedOutputs = field(default_factory=RecordedOutputs)

    @property
    def images(self) -> ImageSplit:
        """Raises DataError where nothing was held out for val."""
        return self.restored.data.split(self.split)

    @property
    def classes(self) -> list[str]:
        return self.restored.data.classes

    @property
    def protocol(self) -> dict[str, Any]:
        """See vit.evaluation.protocol.Protocol.describe."""
        restored = self.restored
        preprocessing = restored.model.preprocessing
        return restored.protocol.describe(preprocessing, self.images, self.classes)


def nothing_to_check(model: MeasuredModel) -> None:
    """The check of a measurement that is always possible."""


@dataclass(frozen=True)
class Measurement:
    """An entry of MEASUREMENTS.

    measure: see the module's docstring.
    check: raises ConfigError where it can't be measured; called before anything is measured.
    needs: what is recorded for it, of "logits" and "features".
    """

    measure: Callable[[MeasuredModel], Result]
    check: Callable[[MeasuredModel], None] = nothing_to_check
    needs: frozenset[str] = frozenset()


def measure_accuracy(model: MeasuredModel, needs: frozenset[str]) -> Result:
    """Loss and accuracy; keeps in model.outputs what the measurements to come need."""
    restored, images = model.restored, model.images
    answers = restored.protocol.answers
    logits, features = "logits" in needs or answers is not None, "features" in needs
    with record_outputs(restored.judge, logits, features) as outputs:
        start = time.perf_counter()
        metrics: dict[str, Any] = {}
        metrics |= restored.measure(restored.judge, model.split, model.workers, outputs.keep)
        images_per_second = metrics["n"] / (time.perf_counter() - start)
    model.outputs = outputs
    if answers is not None:
        # Neither cross-entropy nor a class's recall is defined where several classes are right
        metrics |= {"loss": None, **top_of_answers(outputs.logits, answers)}
        metrics |= {"balanced_top1": None, "macro_f1": None}

    low, high = wilson_interval(metrics["top1"], int(metrics["n"]))
    protocol = model.protocol
    numbers = {
        "split": model.split,
        "data": str(images),
        "checkpoint": model.source or str(model.path),
        "precision": restored.precision.name,
        **metrics,
        "top1_interval_95": [low, high],
        "images_per_second": round(images_per_second, 2),
        "protocol": protocol,
    }
    loss = "" if metrics["loss"] is None else f"loss {metrics['loss']:.4f}, "
    line = (
        f"{images}: {loss}top-1 {metrics['top1']:.2%} "
        f"(95 % interval {low:.2%} to {high:.2%}), top-5 {metrics['top5']:.2%}, "
        f"{of_unbalanced_classes(model, metrics)}"
        f"n {metrics['n']:,}, {images_per_second:.0f} images/s ({restored.precision.name}); "
        f"{protocol_line(protocol)}"
    )
    return numbers, line


def of_unbalanced_classes(model: MeasuredModel, metrics: dict[str, Any]) -> str:
    """What to know beside top-1 where the images' classes are of very unequal size, for the line.

    Empty where they are not, and where an image has several labels.
    """
    labels = model.images.labels
    if model.restored.protocol.answers is not None or not are_unbalanced(labels.bincount()):
        return ""
    label, share = largest_share(labels)
    return (
        f"balanced accuracy {metrics['balanced_top1']:.2%}, macro F1 {metrics['macro_f1']:.2%} "
        f"(always {model.classes[label]} would have top-1 {share:.2%}), "
    )


def in_views(model: MeasuredModel, views: str) -> MeasuredModel:
    """The same model, measured in these views of every image, a key of protocol.VIEWS.

    Raises ConfigError where an image has no such views, or they are of other classes.
    """
    preprocessing, mirror = model.restored.model.preprocessing, model.restored.config.data.mirror
    if views in MIRRORED and not mirror:
        raise ConfigError(
            f"views={views} does not go with data.mirror=false: a mirrored image would be of "
            "another class"
        )
    if views in CROPPED and model.images.pixels is not None:
        raise ConfigError(f"views={views} is for image files; {model.images.title} has no border")
    if views in CROPPED and preprocessing.eval_crop in (None, 1.0):
        raise ConfigError(
            f"views={views} needs images that are larger than the crop; give data.eval_crop=0.875, "
            "for example"
        )
    protocol = replace(model.restored.protocol, views=views)
    return replace(model, restored=replace(model.restored, protocol=protocol))


def refuse_other_protocols(model: MeasuredModel, key: str, views: bool) -> None:
    """Raise ConfigError for a measurement by one label an image, or one view, where there are more.

    key: of the measurement. views: whether several views are refused too.
    """
    protocol = model.restored.protocol
    if protocol.answers is not None:
        raise ConfigError(
            f"{key}=true needs one label an image, and {model.images.title} has several; leave it "
            "out"
        )
    if views and protocol.views != "one":
        raise ConfigError(f"{key}=true looks at one view of an image; leave views out")


def check_report(model: MeasuredModel) -> None:
    refuse_other_protocols(model, "report", views=False)


def check_neighbors(model: MeasuredModel) -> None:
    refuse_other_protocols(model, "knn", views=True)
    if len(model.restored.data.train) == 0:
        raise ConfigError(
            f"knn=true looks for neighbors in train, and {model.images.title} brings no training "
            "images; leave it out"
        )
    if model.split == "train":
        raise ConfigError(
            "knn=true looks for neighbors in train, where with split=train every image would find "
            "itself; use split=val or split=test"
        )


def measure_neighbors(model: MeasuredModel) -> Result:
    """Accuracy of the nearest neighbors' vote by the pooled features.

    The neighbors are images of train, prepared as in evaluation.
    """
    restored, labels = model.restored, model.images.labels
    train = restored.data.train
    # A second pass, over train, fills the bank; without augmentation
    with record_outputs(restored.model, features=True) as bank:
        restored.measure(restored.model, "train", model.workers, bank.keep)

    device = restored.precision.device
    predicted = nearest_neighbors(
        model.outputs.features.to(device),
        bank.features.to(device),
        train.labels.to(device),
        len(model.classes),
        NUM_NEIGHBORS,
        NEIGHBOR_TEMPERATURE,
    )
    top1 = (predicted.cpu() == labels).double().mean().item()
    numbers = {
        "knn_top1": top1,
        "knn_top1_interval_95": list(wilson_interval(top1, len(labels))),
        "knn_bank": str(train),
    }
    line = f"top-1 of the {NUM_NEIGHBORS} nearest neighbors {top1:.2%}, from {train}"
    return numbers, line


def check_corruptions(model: MeasuredModel) -> None:
    refuse_other_protocols(model, "corruptions", views=True)
    images = model.images
    # Image files are corrupted at the size the model sees them, other images as they are
    height, width = model.restored.model.preprocessing.image_size
    if images.pixels is not None:
        height, width = images.pixels.shape[-2:]
    if max(height, width) > MAX_SIDE:
        raise ConfigError(
            f"corruptions=true is for small images, of at most {MAX_SIDE} px: its strengths would "
            f"hardly show in those of {images.title}, {height} x {width} px; leave it out"
        )


def measure_corruptions(model: MeasuredModel) -> Result:
    """Top-1 under every corruption at every severity; prints a line for each corruption."""
    restored = model.restored
    images = load_pixels(restored, model.images, model.workers)
    assert images.pixels is not None
    accuracies: dict[str, list[float]] = {}
    for kind in CORRUPTIONS:
        accuracies[kind] = []
        for severity in range(1, NUM_SEVERITIES + 1):
            corrupted = replace(images, pixels=corrupt(images.pixels, kind, severity))
            # The pixels are in memory, so there is nothing for workers to decode
            metrics = restored.measure_images(restored.judge, corrupted, workers=0)
            accuracies[kind].append(metrics["top1"])
        row = ", ".join(f"{top1:.1%}" for top1 in accuracies[kind])
        print(f"{kind}: top-1 {row} at severity 1 to {NUM_SEVERITIES}")

    every = [top1 for row in accuracies.values() for top1 in row]
    mean = sum(every) / len(every)
    numbers = {"corruptions_top1": mean, "corruptions": accuracies}
    return numbers, f"top-1 under corruptions, their mean {mean:.2%}"


def load_pixels(restored: RestoredModel, images: ImageSplit, workers: int) -> ImageSplit:
    """The split with uint8 pixels on the CPU.

    Images of a small data set stay as they are; image files are read at the model's size.
    """
    cpu = torch.device("cpu")
    if images.pixels is not None:
        return images.to(cpu)
    preprocessing = restored.model.preprocessing
    pixels = []
    batches = evaluation_batches(images, restored.batch_size, preprocessing, workers, cpu)
    for inputs, _ in batches:
        values = preprocessing.denormalize(inputs) * 255
        pixels.append(values.round().to(torch.uint8))
    return replace(images, pixels=torch.cat(pixels), paths=None)


def measure_calibration(model: MeasuredModel) -> Result:
    """Loss and ECE, also with the temperature fitted on the validation split.

    The temperature is None where nothing is held out. Raises CheckpointError where the logits are
    not finite.
    """
    logits, labels = model.outputs.logits, model.images.labels
    if not logits.isfinite().all():
        raise CheckpointError(
            f"{model.path}: some outputs of the model are not finite numbers, so there is nothing "
            "to report; evaluate without report=true, or train again at a lower optimizer.lr"
        )
    ece = reliability(logits, labels, CALIBRATION_BINS).expected_calibration_error()
    numbers: dict[str, Any] = {
        "nll": negative_log_likelihood(logits, labels),
        "ece": ece,
        "temperature": None,
    }
    line = f"expected calibration error {ece:.2%}"

    # Fitted on the images that are measured, the temperature would flatter
    held_out = model.restored.data.val
    if held_out is None:
        return numbers, line
    temperature = fit_temperature(validation_logits(model), held_out.labels)
    scaled = reliability(logits, labels, CALIBRATION_BINS, temperature)
    numbers["temperature"] = temperature
    numbers["nll_at_temperature"] = negative_log_likelihood(logits, labels, temperature)
    numbers["ece_at_temperature"] = scaled.expected_calibration_error()
    line += f", {numbers['ece_at_temperature']:.2%} at temperature {temperature:.3f}"
    return numbers, line


def validation_logits(model: MeasuredModel) -> Tensor:
    """The logits for the validation split, which may be the one that is measured."""
    if model.split == "val":
        return model.outputs.logits
    restored = model.restored
    with record_outputs(restored.judge, logits=True) as outputs:
        restored.measure(restored.judge, "val", model.workers, outputs.keep)
    return outputs.logits


# By the key of evaluate.py that asks for it; the report's page draws on the numbers of all
MEASUREMENTS = {
    "knn": Measurement(measure_neighbors, check_neighbors, needs=frozenset({"features"})),
    "corruptions": Measurement(measure_corruptions, check_corruptions),
    "report": Measurement(measure_calibration, check_report, needs=frozenset({"logits"})),
}


def measure_all(
    model: MeasuredModel, measurements: Sequence[Measurement]
) -> tuple[dict[str, Any], list[str]]:
    """Accuracy and the measurements asked for: numbers for evaluation.json and lines to show."""
    needs = frozenset(need for measurement in measurements for need in measurement.needs)
    numbers, line = measure_accuracy(model, needs)
    lines = [line]
    for measurement in measurements:
        more_numbers, line = measurement.measure(model)
        numbers |= more_numbers
        lines.append(line)
    return numbers, lines
