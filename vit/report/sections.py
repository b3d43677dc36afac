"""What the sections of the page show: a function for each, from a Report to values of page.html.

Most save images on the way, and raise OSError where the disk refuses.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn

from vit.config.config import flatten
from vit.data.loader import evaluation_batches
from vit.data.splits import sample_evenly
from vit.evaluation.corruptions import CORRUPTIONS, NUM_SEVERITIES, corrupt
from vit.evaluation.measurements import (
    CALIBRATION_BINS,
    NUM_NEIGHBORS,
    MeasuredModel,
    load_pixels,
)
from vit.evaluation.metrics import PerClass, confidences, most_confused, per_class, reliability
from vit.figures.attention import (
    colorize,
    displayable_images,
    enlarge,
    image_panels,
    layers_to_show,
)
from vit.figures.confusion import (
    MAX_CLASSES_WITH_COUNTS,
    MAX_CLASSES_WITH_NAMES,
    classes_per_cell,
    draw_confusion,
)
from vit.files import read_json, read_jsonl
from vit.model.attention_maps import shows_class_token, trace_images
from vit.model.cost import count_macs
from vit.model.stems import pixel_filters
from vit.model.vision_transformer import VisionTransformer
from vit.report.drawings import (
    draw_calibration,
    draw_curves,
    filter_components,
    mosaic,
    position_similarity,
)
from vit.report.images import save_figure, save_pixels
from vit.report.values import interval, percent
from vit.runs.selection import CRITERIA
from vit.runtime.device import describe_device
from vit.text import format_duration

MAX_CLASSES_UNFOLDED = 30  # in the table of classes; of more, the worst are shown
WORST_CLASSES = 10
CONFUSED_PAIRS = 15
EXAMPLES = 12  # images of each kind
ATTENTION_EXAMPLES = 8
FILTERS = 28
FILTER_COLUMNS = 7


@dataclass(frozen=True)
class Report:
    """A measured model, and the folder the page and its images are written to.

    numbers: what evaluation.json holds.
    run: the run folder that the checkpoint lies in; None where it lies in none.
    """

    folder: Path
    model: MeasuredModel
    numbers: dict[str, Any]
    run: Path | None

    @property
    def network(self) -> VisionTransformer:
        return self.model.restored.model

    @property
    def logits(self) -> Tensor:
        return self.model.outputs.logits

    @property
    def labels(self) -> Tensor:
        return self.model.images.labels

    @property
    def configuration(self) -> dict[str, Any]:
        """The run's keys that have a value, with dots in them; empty for foreign weights."""
        flat = flatten(self.model.restored.header.get("config") or {})
        return {key: value for key, value in flat.items() if value is not None}


def tiles(report: Report) -> list[tuple[str, str, str]]:
    """(name, value, note) of the numbers at the top of the page."""
    numbers, n = report.numbers, len(report.labels)

    def accuracy(name: str, key: str) -> tuple[str, str, str]:
        return name, percent(numbers[key]), interval(numbers[key], n)

    shown = [accuracy("top-1", "top1")]
    if len(report.model.classes) > 5:
        shown.append(accuracy("top-5", "top5"))
    shown += [
        ("balanced accuracy", percent(numbers["balanced_top1"]), "mean recall of the classes"),
        ("macro F1", percent(numbers["macro_f1"]), "mean over the classes"),
        ("loss", f"{numbers['nll']:.3f}", "cross-entropy, nats"),
        ("calibration error", percent(numbers["ece"]), f"ECE, {CALIBRATION_BINS} bins"),
    ]
    if numbers["temperature"] is not None:
        note = f"with it ECE is {percent(numbers['ece_at_temperature'])}"
        shown.append(("temperature", f"{numbers['temperature']:.2f}", note))
    if "knn_top1" in numbers:
        shown.append(accuracy(f"{NUM_NEIGHBORS}-NN top-1", "knn_top1"))
    if "corruptions_top1" in numbers:
        note = f"mean of {len(CORRUPTIONS)} kinds, {NUM_SEVERITIES} severities"
        shown.append(("top-1, corrupted", percent(numbers["corruptions_top1"]), note))
    return shown


def classes(report: Report) -> dict[str, Any]:
    """Precision, recall and F1 of every class, and of many classes those of the lowest F1."""
    names = report.model.classes
    metrics = per_class(report.logits.argmax(dim=1), report.labels, len(names))
    rows = class_rows(names, metrics)
    worst = None
    if len(names) > MAX_CLASSES_UNFOLDED:
        # Classes without images have no F1 and come last
        f1 = np.where(metrics.support > 0, metrics.f1, 2.0)
        worst = [rows[label] for label in f1.argsort(kind="stable")[:WORST_CLASSES]]
    return {"rows": rows, "worst": worst}


def class_rows(names: list[str], metrics: PerClass) -> list[dict[str, Any]]:
    return [
        {
            "name": numbered(names, label),
            "f1": float(metrics.f1[label]),
            "precision": float(metrics.precision[label]),
            "recall": float(metrics.recall[label]),
            "images": int(metrics.support[label]),
        }
        for label in range(len(names))
    ]


def numbered(names: list[str], label: int) -> str:
    """A class's name, with its number where the confusion matrix shows numbers."""
    if len(names) <= MAX_CLASSES_WITH_NAMES or names[label] == str(label):
        return names[label]
    return f"{names[label]} (class {label})"


def confusion(report: Report) -> dict[str, Any]:
    """The confusion matrix, and the pairs of classes that are confused most often."""
    names = report.model.classes
    predicted = report.logits.argmax(dim=1)
    counts = confusion_matrix(
        report.labels.numpy(), predicted.numpy(), labels=np.arange(len(names))
    )
    matrix = torch.from_numpy(counts)
    draw = partial(draw_confusion, confusion=matrix, names=names)
    totals = matrix.sum(dim=1).tolist()
    pairs = []
    # Of two classes, the matrix itself says it all
    if len(names) > 2:
        for true, predicted_label, images in most_confused(matrix, CONFUSED_PAIRS):
            pairs.append(
                {
                    "true": numbered(names, true),
                    "predicted": numbered(names, predicted_label),
                    "images": images,
                    "fraction": images / totals[true],
                }
            )
    return {
        "figure": save_figure(report.folder, "confusion", "confusion matrix", draw),
        "with_counts": len(names) <= MAX_CLASSES_WITH_COUNTS,
        "with_names": len(names) <= MAX_CLASSES_WITH_NAMES,
        "classes_per_cell": classes_per_cell(len(names)),
        "pairs": pairs,
    }


def calibration(report: Report) -> dict[str, Any]:
    """The reliability diagram, without and with the fitted temperature."""
    temperature = report.numbers["temperature"]
    curves = [("as it is", reliability(report.logits, report.labels, CALIBRATION_BINS))]
    if temperature is not None:
        scaled = reliability(report.logits, report.labels, CALIBRATION_BINS, temperature)
        curves.append(("with temperature", scaled))
    draw = partial(draw_calibration, curves=curves)
    return {
        "figure": save_figure(report.folder, "calibration", "reliability diagram", draw),
        "fitted_on": report.model.restored.data.val,
        "fitted_on_itself": report.model.split == "val",
    }


def corruptions(report: Report) -> dict[str, Any] | None:
    """Accuracy under every corruption, and what the corruptions look like on one image."""
    if "corruptions" not in report.numbers:
        return None
    first = report.model.images.subset(torch.tensor([0]))
    pixels = load_pixels(report.model.restored, first, workers=0).pixels
    assert pixels is not None
    strips = []
    for kind in CORRUPTIONS:
        severities = range(1, NUM_SEVERITIES + 1)
        strips.append(torch.cat([pixels, *(corrupt(pixels, kind, level) for level in severities)]))
    # Large enough to be looked at, with whole pixels
    panels = torch.stack(strips).float().expand(-1, -1, 3, -1, -1) / 255
    panels = enlarge(panels, max(1, 72 // max(panels.shape[-2:])))
    alt = "an image under every corruption"
    return {
        "rows": report.numbers["corruptions"],
        "severities": NUM_SEVERITIES,
        "image": save_pixels(report.folder, "corruptions", alt, mosaic(panels)),
    }


def examples(report: Report) -> list[dict[str, Any]]:
    """The mistakes the model was surest of, and the hits it was least sure of."""
    confidence, predicted = confidences(report.logits)
    correct = predicted == report.labels
    return [
        {
            "title": "Most confident mistakes",
            "images": example_images(report, "mistake", ~correct, -confidence),
        },
        {
            "title": "Least confident hits",
            "images": example_images(report, "hit", correct, confidence),
        },
    ]


def example_images(
    report: Report, name: str, chosen: Tensor, order: Tensor
) -> list[dict[str, Any]]:
    """The chosen images (n,) that come first by `order` (n,), with captions."""
    count = min(EXAMPLES, int(chosen.sum()))
    if not count:
        return []
    # A stable sort, so that equal confidences keep the data set's order
    indices = torch.where(chosen, order, torch.inf).argsort(stable=True)[:count]
    inputs = inputs_of(report, indices)
    images = displayable_images(inputs, report.network.preprocessing, side=160)
    confidence, predicted = confidences(report.logits[indices])
    names = report.model.classes
    shown = []
    for number, image in enumerate(images):
        label = int(predicted[number])
        true = int(report.labels[indices[number]])
        caption = f"{names[label]} {percent(float(confidence[number]))}"
        if label != true:
            caption += f", is {names[true]}"
        saved = save_pixels(report.folder, f"{name}_{number + 1:02}", caption, image)
        shown.append({"image": saved, "caption": caption})
    return shown


def inputs_of(report: Report, indices: Tensor) -> Tensor:
    """The model's inputs (B, C, *image_size) for some of the images."""
    batches = evaluation_batches(
        report.model.images.subset(indices),
        len(indices),
        report.network.preprocessing,
        workers=0,
        device=report.model.restored.precision.device,
    )
    return next(batches)[0]


def attention(report: Report) -> dict[str, Any]:
    """Attention maps over images of all classes."""
    network, names = report.network, report.model.classes
    indices = sample_evenly(report.labels, ATTENTION_EXAMPLES)
    predicted = report.logits.argmax(dim=1)
    shown = []
    # Traced one by one: of a large model the maps of a single image can take half a gigabyte
    for number, one_input in enumerate(inputs_of(report, indices).split(1)):
        image = displayable_images(one_input, network.preprocessing, side=128)
        panels = image_panels(trace_images(network, one_input), network, image)
        caption = names[int(report.labels[indices[number]])]
        label = names[int(predicted[indices[number]])]
        if label != caption:
            caption += f", taken for {label}"
        name = f"attention_{number + 1:02}"
        saved = save_pixels(report.folder, name, caption, mosaic(panels))
        shown.append({"image": saved, "caption": caption})
    return {
        "class_token": shows_class_token(network),
        "layers": layers_to_show(len(network.encoder.blocks)),
        "images": shown,
    }


def patch_filters(report: Report) -> dict[str, Any] | None:
    """Principal components of the filters that see pixels; None for hybrids with a ResNet."""
    patches = report.network.embeddings.patch_embedding
    convolution = pixel_filters(patches)
    if convolution is None:
        return None
    weight = convolution.weight.detach().float().cpu()
    # Around their mean, n filters vary along n - 1 axes
    filters = filter_components(weight, min(FILTERS, len(weight) - 1))
    count = len(filters)
    # The last row is filled up with gray
    blank = torch.full((-count % FILTER_COLUMNS, *filters.shape[1:]), 0.5)
    panels = torch.cat([filters, blank]).unflatten(0, (-1, FILTER_COLUMNS))
    panels = enlarge(panels, max(1, 64 // max(panels.shape[-2:])))
    layer = "patch embedding" if patches.stem is None else "first convolution"
    alt = f"principal components of the filters of the {layer}"
    saved = save_pixels(report.folder, "filters", alt, mosaic(panels))
    return {"layer": layer, "count": count, "image": saved}


def position_embeddings(report: Report) -> dict[str, Any] | None:
    """Similarity of the position embeddings; None where they are not learned."""
    embeddings = report.network.embeddings
    positions = embeddings.position_embedding
    if not isinstance(positions, nn.Parameter):
        return None
    grid = embeddings.patch_embedding.grid_size
    # The class token's embedding has no place in the grid
    of_patches = positions.detach().float().cpu()[0, int(embeddings.cls_position) :]
    similarity = position_similarity(of_patches, grid)
    lowest = similarity.min()
    # From the lowest similarity to 1, which every patch has with itself
    scaled = (similarity - lowest) / (1 - lowest).clamp(min=1e-6)
    panels = colorize(scaled[:, :, None].clamp(0, 1))
    panels = enlarge(panels, max(1, round(560 / max(grid) ** 2)))
    alt = "similarity of the position embeddings"
    return {
        "lowest": float(lowest),
        "image": save_pixels(report.folder, "positions", alt, mosaic(panels)),
    }


def learning_curves(report: Report) -> dict[str, Any] | None:
    """Loss and accuracy of the run; None without its metrics.jsonl."""
    rows = read_metrics(report.run)
    if not rows:
        return None
    # None where nothing was held out to select a checkpoint on
    result = read_result(report.run)
    best_step = result.get("best_step")
    if not isinstance(best_step, int):
        best_step = None
    draw = partial(draw_curves, rows=rows, best_step=best_step)
    selected = best_step is not None and result.get("val_top1") is not None
    return {
        "figure": save_figure(report.folder, "curves", "learning curves", draw),
        # Earlier versions selected by top-1 alone
        "best_in": CRITERIA.get(result.get("select", "top1")) if selected else None,
    }


def read_metrics(run: Path | None) -> list[dict[str, Any]]:
    """The rows of the run's metrics.jsonl that have a step."""
    path = None if run is None else run / "metrics.jsonl"
    if path is None or not path.is_file():
        return []
    return [row for row in read_jsonl(path) if isinstance(row.get("step"), int)]


def read_result(run: Path | None) -> dict[str, Any]:
    """The run's result.json, or {} where it is missing or damaged."""
    if run is None:
        return {}
    try:
        result = read_json(run / "result.json")
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def cost(report: Report) -> list[tuple[str, str]]:
    """(name, value) of what the model and its training cost."""
    precision, result = report.model.restored.precision, read_result(report.run)
    device = f"{describe_device(precision.device)}, {precision.name}"
    speed = report.numbers["images_per_second"]
    rows = [
        ("parameters", f"{report.network.num_parameters():,}"),
        ("multiply-adds an image", f"{count_macs(report.network) / 1e9:.3g} G"),
        ("evaluation", f"{speed:,.0f} images/s on {device}, reading included"),
    ]
    if report.model.path.is_file():
        rows.append(("file", f"{report.model.path.stat().st_size / 1e6:.1f} MB"))
    # A result.json of another version may lack these
    seconds, speed = result.get("seconds"), result.get("images_per_second")
    if isinstance(seconds, int | float):
        steps = f"{result.get('steps', 0):,} steps"
        rows.append(("training", f"{format_duration(seconds)} for {steps}"))
    if isinstance(speed, int | float):
        rows.append(("training speed", f"{speed:,.0f} images/s, on the machine of the run"))
    pflops, fraction = result.get("pflops"), result.get("product_rate_share")
    if isinstance(pflops, int | float) and isinstance(fraction, int | float):
        text = f"{pflops:.3g} PFLOPs, {fraction:.0%} of the machine's product rate"
        rows.append(("training compute", text))
    return rows
