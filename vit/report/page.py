"""One page about a measured model: index.html, which needs no other file, and its pictures as PNGs beside it.

Everything is drawn from what evaluate.py measured (Measured); the numbers come from vit.evaluation.metrics and .measurements. Figures with
text are drawn twice, for light and for dark screens. The page holds its pictures as base64 and runs no script.

Sources: position similarity and patch filters, Dosovitskiy et al. 2021 (arXiv:2010.11929), figure 7; reliability diagrams,
Guo et al. 2017 (arXiv:1706.04599), figure 1.
"""

import base64
import html
import json
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from vit.config.config import flatten
from vit.data.loader import evaluation_batches
from vit.data.splits import sample_evenly
from vit.evaluation.accuracy import wilson_interval
from vit.evaluation.corruptions import SEVERITIES, corrupt
from vit.evaluation.measurements import BINS, NEIGHBOURS, Measured, small_pictures
from vit.evaluation.metrics import PerClass, confidences, confusion_matrix, most_confused, per_class
from vit.figures.attention import colorize, displayable_images, image_panels, layers_to_show
from vit.files import write_text
from vit.model.attention_maps import trace_images
from vit.model.cost import count_macs
from vit.model.vision_transformer import VisionTransformer
from vit.report.drawings import (
    CELLS,
    DARK,
    DOTS,
    LIGHT,
    NAMED,
    NUMBERED,
    Theme,
    draw_calibration,
    draw_confusion,
    draw_curves,
    enlarge,
    filter_components,
    mosaic,
    position_similarity,
)
from vit.runtime.device import describe_device

CLASSES_SHOWN = 30  # in the table of classes before it is folded away


PAIRS, PICTURES, ATTENTIONS, FILTERS = 15, 12, 8, 28


def write_report(folder: Path, measured: Measured) -> Path:
    """Write index.html and the PNGs into a folder that is there, and return the page's path. Raises OSError."""
    parts = [
        headline(measured),
        *classes_part(folder, measured),
        *calibration_part(folder, measured),
        *corruptions_part(folder, measured),
        *examples_part(folder, measured),
        *attention_part(folder, measured),
        *weights_part(folder, measured.restored.model),
        *curves_part(folder, measured),
        *cost_part(measured),
        *configuration_part(measured),
        NOTES,
    ]
    title = f"{model_name(measured)} on {measured.images.title}"
    page = folder / "index.html"
    write_text(
        page,
        PAGE.replace("TITLE", escape(title))
        .replace("STYLE", STYLE)
        .replace("BODY", "\n".join(parts)),
    )
    return page


def model_name(measured: Measured) -> str:
    return str(settings(measured).get("model.name", measured.path.stem))


def settings(measured: Measured) -> dict[str, Any]:
    """The configuration the run was trained with, dots in its keys; nothing of foreign weights."""
    return flatten(measured.restored.header.get("config") or {})


class Html(str):
    """Text that is HTML already; every other text is escaped where it enters the page."""


def escape(text: object) -> Html:
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


def heading(text: str) -> Html:
    return Html(f"<h2>{escape(text)}</h2>")


def paragraph(text: str) -> Html:
    return Html(f"<p>{escape(text)}</p>")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Html:
    """Columns whose values start with a digit, but for the first, stand to the right."""
    right = [
        number and any(str(row[number])[:1].isdigit() for row in rows)
        for number in range(len(head))
    ]
    style = [" class=n" if column else "" for column in right]
    titles = "".join(
        f"<th{kind}>{escape(title)}</th>" for kind, title in zip(style, head, strict=True)
    )
    lines = [
        "<tr>"
        + "".join(
            f"<td{kind}>{escape(f'{value:,}' if isinstance(value, int) else value)}</td>"
            for kind, value in zip(style, row, strict=True)
        )
        + "</tr>"
        for row in rows
    ]
    return Html(
        f"<div class=wide><table><thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def folded(title: str, body: str) -> Html:
    return Html(f"<details><summary>{escape(title)}</summary>{body}</details>")


def data_address(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def share(value: float) -> str:
    return f"{100 * value:.1f}\u00a0%"  # a space that keeps the sign on its number's line


def with_interval(value: float, n: int) -> str:
    """The 95 % interval of a share of n, at least one."""
    low, high = wilson_interval(value, n)
    return f"{100 * low:.1f} to {100 * high:.1f}\u00a0%"


def figure(
    folder: Path, name: str, alt: str, draw: Callable[[Theme], Figure], wide: bool = False
) -> Html:
    """Save draw(theme) as NAME.png and NAME_dark.png; the page shows the one that suits the screen."""
    addresses = []
    for theme in (LIGHT, DARK):
        path = folder / f"{name}{theme.suffix}.png"
        with matplotlib.rc_context(theme.settings()), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Glyph"
            )  # names in scripts that the font lacks; the tables have them
            draw(theme).savefig(path, dpi=DOTS)
        addresses.append(data_address(path))
    return Html(
        f"<div class='figure{' wide' if wide else ''}'><picture><source media='(prefers-color-scheme: dark)' "
        f"srcset='{addresses[1]}'><img src='{addresses[0]}' alt='{escape(alt)}'></picture></div>"
    )


def picture(folder: Path, name: str, alt: str, pixels: Tensor, style: str = "") -> Html:
    """Save (3 or 4, height, width) in 0..1 as NAME.png; the fourth channel is opacity."""
    path = folder / f"{name}.png"
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(values).save(path, optimize=True)
    return Html(f"<img class='{style}' src='{data_address(path)}' alt='{escape(alt)}'>")


def gallery(items: Sequence[tuple[Html, str]], style: str = "gallery") -> Html:
    shown = "".join(
        f"<figure>{image}<figcaption>{escape(text)}</figcaption></figure>" for image, text in items
    )
    return Html(f"<div class={style}>{shown}</div>")


def headline(measured: Measured) -> Html:
    found, n = measured.found, len(measured.images)
    tiles = [("top-1", share(found["top1"]), with_interval(found["top1"], n))]
    if measured.logits.shape[1] > 5:
        tiles.append(("top-5", share(found["top5"]), with_interval(found["top5"], n)))
    tiles += [
        ("macro F1", share(found["macro_f1"]), "mean over the classes"),
        ("loss", f"{found['nll']:.3f}", "cross-entropy, nats"),
        ("calibration error", share(found["ece"]), f"ECE, {BINS} bins"),
    ]
    if found["temperature"] is not None:
        tiles.append(
            (
                "temperature",
                f"{found['temperature']:.2f}",
                f"with it ECE is {share(found['ece_at_temperature'])}",
            )
        )
    if "knn_top1" in found:
        tiles.append(
            (
                f"{NEIGHBOURS}-NN top-1",
                share(found["knn_top1"]),
                with_interval(found["knn_top1"], n),
            )
        )
    if "corruptions" in found:
        tiles.append(
            (
                "top-1, corrupted",
                share(found["corruptions_top1"]),
                f"mean of {len(SEVERITIES)} kinds, 5 severities",
            )
        )
    shown = "".join(
        f"<div><b>{escape(name)}</b><strong>{escape(value)}</strong><span>{escape(note)}</span></div>"
        for name, value, note in tiles
    )
    return Html(
        f"<p>Measured on {escape(measured.images)} of {measured.logits.shape[1]:,} classes (split: "
        f"{escape(found['split'])}); ranges are 95 % intervals.</p><div class=tiles>{shown}</div>"
        f"<p class=note>{escape(measured.path)}, {datetime.now():%Y-%m-%d %H:%M}</p>"
    )


def classes_part(folder: Path, measured: Measured) -> list[Html]:
    names, confusion = measured.restored.data.classes, confusion_of(measured)
    each, count = per_class(confusion), len(names)
    head = ["class", "F1", "", "precision", "recall", "recall, 95 %", "images"]
    rows = class_rows(names, each)
    parts = [heading("Classes")]
    if count <= CLASSES_SHOWN:
        parts.append(table(head, rows))
    else:
        worst = torch.where(each.support > 0, each.f1, 2.0).argsort(stable=True)[:10].tolist()
        parts += [
            paragraph("The ten of the lowest F1:"),
            table(head, [rows[number] for number in worst]),
            folded(f"All {count:,} classes", table(head, rows)),
        ]
    parts.append(heading("Confusion"))
    told = "Rows: the true class, columns: the predicted one. Colour: share of the row"
    told += "." if count <= NUMBERED else ", its root, so that rare confusions show."
    told += "" if count <= NAMED else " Classes by their number, from 0, in the data set's order."
    told += (
        ""
        if count <= CELLS
        else f" A cell holds {-(-count // CELLS)} neighbouring classes each way."
    )
    pairs = most_confused(confusion, PAIRS)
    parts += [
        paragraph(told),
        figure(
            folder,
            "confusion",
            "confusion matrix",
            lambda theme: draw_confusion(theme, confusion, names),
            wide=count > NUMBERED,
        ),
    ]
    if pairs and count > 2:
        parts += [
            paragraph("The pairs confused most often:"),
            table(
                ["is", "taken for", "images", "of the class"],
                [
                    (
                        named(names, true),
                        named(names, taken),
                        number,
                        share(number / int(each.support[true])),
                    )
                    for true, taken, number in pairs
                ],
            ),
        ]
    return parts


def named(names: Sequence[str], label: int) -> str:
    """A class's name, and its number where the confusion matrix shows numbers."""
    return (
        names[label]
        if len(names) <= NAMED or names[label] == str(label)
        else f"{names[label]} (class {label})"
    )


def class_rows(names: Sequence[str], each: PerClass) -> list[list[object]]:
    rows: list[list[object]] = []
    for label in range(len(names)):
        f1, precision, recall, n = (
            float(values[label]) for values in (each.f1, each.precision, each.recall, each.support)
        )
        bar = Html(f"<i class=bar style='--f:{f1:.3f}'></i>")
        numbers = (
            ["–", "", "–", "–", "–", 0]
            if not n
            else [
                share(f1),
                bar,
                share(precision),
                share(recall),
                with_interval(recall, int(n)),
                int(n),
            ]
        )
        rows.append([named(names, label), *numbers])
    return rows


def confusion_of(measured: Measured) -> Tensor:
    return confusion_matrix(
        measured.logits.argmax(dim=1), measured.images.labels, measured.logits.shape[1]
    )


def calibration_part(folder: Path, measured: Measured) -> list[Html]:
    found, held_out = measured.found, measured.held_out
    rows: list[tuple[object, ...]] = [("as it is", "1", share(found["ece"]), f"{found['nll']:.4f}")]
    if held_out is None:
        told = "No temperature was fitted: nothing is held out of train (data.val_fraction=0) to fit it on."
    else:
        rows.append(
            (
                "with temperature",
                f"{found['temperature']:.3f}",
                share(found["ece_at_temperature"]),
                f"{found['nll_at_temperature']:.4f}",
            )
        )
        told = (
            f"The logits are divided by the temperature of the least loss on {held_out.images}"
            + (
                ", the images measured here themselves: these figures flatter."
                if held_out.same
                else "."
            )
        )
    return [
        heading("Calibration"),
        paragraph(
            "Are 80 % of the predictions right that the model gives 80 %? Points below the line are overconfident; "
            "bars are 95 % intervals of the accuracy in each bin of confidence."
        ),
        figure(
            folder,
            "calibration",
            "reliability diagram",
            lambda theme: draw_calibration(theme, measured),
        ),
        table(["", "temperature", "ECE", "loss"], rows),
        paragraph(told),
    ]


def corruptions_part(folder: Path, measured: Measured) -> list[Html]:
    if "corruptions" not in measured.found:
        return []
    found, clean = measured.found["corruptions"], measured.found["top1"]
    rows = []
    for kind, accuracies in found.items():
        cells = [
            Html(f"<span class=heat style='--f:{top1:.3f}'>{share(top1)}</span>")
            for top1 in accuracies
        ]
        rows.append([kind, *cells, share(sum(accuracies) / 5)])
    one = small_pictures(measured.restored, measured.images.subset(torch.tensor([0])), 0)
    assert one.pixels is not None
    strips = [
        torch.cat([one.pixels, *(corrupt(one.pixels, kind, severity) for severity in range(1, 6))])
        for kind in SEVERITIES
    ]
    panels = torch.stack(strips).float().expand(-1, -1, 3, -1, -1) / 255
    factor = max(1, 72 // max(panels.shape[-2:]))
    return [
        heading("Corruptions"),
        paragraph(
            f"Top-1 under changes of rising strength; without them {share(clean)}. Strengths are this project's own "
            f"(vit/corruptions.py), so compare models measured here, not published figures."
        ),
        table(["", *(f"severity {severity}" for severity in range(1, 6)), "mean"], rows),
        folded(
            "How these look",
            Html(
                f"<p class=note>From the top: {escape(', '.join(SEVERITIES))}; from the left: the "
                f"picture as it is, severity 1 to 5.</p>"
            )
            + picture(
                folder,
                "corruptions",
                "a picture under every corruption",
                mosaic(enlarge(panels, factor), 4),
            ),
        ),
    ]


def inputs_of(measured: Measured, indices: Tensor) -> Tensor:
    """The model's inputs (B, C, *image_size) for some of the images."""
    batches = evaluation_batches(
        measured.images.subset(indices),
        len(indices),
        measured.restored.model.preprocessing,
        0,
        measured.restored.precision.device,
    )
    return next(batches)[0]


def examples_part(folder: Path, measured: Measured) -> list[Html]:
    chance, predicted = confidences(measured.logits)
    right = predicted == measured.images.labels
    parts = []
    for name, title, order, fits in (
        ("mistake", "Most confident mistakes", -chance, ~right),
        ("hit", "Least confident hits", chance, right),
    ):
        chosen = torch.where(fits, order, torch.inf).argsort(stable=True)[
            : min(PICTURES, int(fits.sum()))
        ]
        parts.append(heading(title))
        if not len(chosen):
            parts.append(paragraph("None."))
            continue
        names, labels = measured.restored.data.classes, measured.images.labels
        pictures = displayable_images(
            inputs_of(measured, chosen), measured.restored.model.preprocessing, side=160
        )
        items = []
        for number, (image, index) in enumerate(zip(pictures, chosen.tolist(), strict=True)):
            true, taken = names[int(labels[index])], names[int(predicted[index])]
            told = f"{taken} {share(float(chance[index]))}" + (
                "" if right[index] else f", is {true}"
            )
            items.append((picture(folder, f"{name}_{number + 1:02}", told, image, "pixels"), told))
        parts.append(gallery(items))
    return parts


def attention_part(folder: Path, measured: Measured) -> list[Html]:
    """Traced one by one: of a large model the maps of a single image can take half a gigabyte."""
    model, names = measured.restored.model, measured.restored.data.classes
    chosen = sample_evenly(measured.images.labels, ATTENTIONS)
    predicted, items = measured.logits.argmax(dim=1), []
    for number, (index, image) in enumerate(
        zip(chosen.tolist(), inputs_of(measured, chosen), strict=True)
    ):
        shown = displayable_images(image[None], model.preprocessing, side=128)
        panels = image_panels(trace_images(model, image[None]), model, shown)
        true, taken = names[int(measured.images.labels[index])], names[int(predicted[index])]
        told = true if true == taken else f"{true}, taken for {taken}"
        items.append((picture(folder, f"attention_{number + 1:02}", told, mosaic(panels, 4)), told))
    layers = layers_to_show(len(model.encoder.blocks))
    who = (
        "the class token looks"
        if model.global_pool == "cls"
        else "the patches look, in the mean (the model pools them)"
    )
    return [
        heading("Attention"),
        paragraph(
            f"Where {who}: the picture, the mean over the heads in layers {', '.join(map(str, layers))} (from 0), "
            "and last the rollout through all layers. Each map from its lowest (dark) to its highest (bright)."
        ),
        gallery(items, "strips"),
    ]


def weights_part(folder: Path, model: VisionTransformer) -> list[Html]:
    """Figure 7 of the ViT paper, left and middle, where the model has what they show."""
    patches, positions = model.embeddings.patch_embedding, model.embeddings.position_embedding
    parts = [heading("Patch filters")]
    if patches.stem is not None:
        parts.append(
            paragraph(
                "Not shown: this is a hybrid, whose patches are features of a ResNet, not pixels."
            )
        )
    else:
        filters = filter_components(patches.projection.weight.detach().float().cpu(), FILTERS)
        factor = max(1, 64 // max(filters.shape[-2:]))
        columns = 7
        blank = torch.ones(-len(filters) % columns, *filters.shape[1:]) / 2
        panels = torch.cat([filters, blank]).unflatten(0, (-1, columns))
        parts += [
            paragraph(
                f"The first {len(filters)} principal components of the patch embedding's filters, from the "
                "largest share of their variance; grey is 0."
            ),
            picture(
                folder,
                "filters",
                "principal components of the patch filters",
                mosaic(enlarge(panels, factor), 4),
                "pixels",
            ),
        ]
    parts.append(heading("Position embeddings"))
    if not isinstance(positions, nn.Parameter):
        return [*parts, paragraph("Not shown: the positions of this model are not learned.")]
    similarity = position_similarity(
        positions.detach().float().cpu()[0, int(model.embeddings.cls_position) :], patches.grid_size
    )
    low = similarity.min()
    panels = colorize(((similarity - low) / (1 - low).clamp(min=1e-6))[:, :, None].clamp(0, 1))
    factor = max(1, round(560 / (max(patches.grid_size) * max(patches.grid_size))))
    return [
        *parts,
        paragraph(
            "How alike each patch's position embedding is to all others (cosine): one map a patch, at the "
            f"patch's place, from {float(low):.2f} (dark) to 1 (bright)."
        ),
        picture(
            folder,
            "positions",
            "similarity of the position embeddings",
            mosaic(enlarge(panels, factor), 4),
            "pixels",
        ),
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that can be read; a run that was killed may have left half of one."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def read_result(run: Path | None) -> dict[str, Any]:
    """result.json of the run, or nothing where it isn't there or isn't whole."""
    try:
        result = json.loads((run / "result.json").read_text()) if run is not None else {}
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def curves_part(folder: Path, measured: Measured) -> list[Html]:
    path = None if measured.run is None else measured.run / "metrics.jsonl"
    rows = [] if path is None or not path.is_file() else read_rows(path)
    if not rows:
        return [
            heading("Learning curves"),
            paragraph("Not shown: there is no metrics.jsonl of a run beside this checkpoint."),
        ]
    best = read_result(measured.run).get("best_step")
    return [
        heading("Learning curves"),
        figure(folder, "curves", "learning curves", lambda theme: draw_curves(theme, rows, best)),
        paragraph(
            "On train: means over the steps between two points, of the augmented images, where augmentation and "
            "mixing are on. The dotted line is the step whose weights are the best checkpoint's."
        ),
    ]


def cost_part(measured: Measured) -> list[Html]:
    restored, result = measured.restored, read_result(measured.run)
    where = f"{describe_device(restored.precision.device)}, {restored.precision.name}"
    rows = [
        ("parameters", f"{restored.model.num_parameters():,}"),
        ("multiply-adds an image", f"{count_macs(restored.model) / 1e9:.3g} G"),
        (
            "evaluation",
            f"{measured.found['images_per_second']:,.0f} images/s on {where}, reading included",
        ),
    ]
    if measured.path.is_file():
        rows.append(("file", f"{measured.path.stat().st_size / 1e6:.1f} MB"))
    if isinstance(seconds := result.get("seconds"), int | float):
        rows.append(("training", f"{duration(seconds)}, {result.get('steps', 0):,} steps"))
    if isinstance(speed := result.get("images_per_second"), int | float):
        rows.append(("training speed", f"{speed:,.0f} images/s, on the machine of the run"))
    return [
        heading("Cost"),
        table(["", ""], [(name, Html(f"<span>{escape(value)}</span>")) for name, value in rows]),
    ]


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def configuration_part(measured: Measured) -> list[Html]:
    rows = [
        (key, Html(f"<span>{escape(value)}</span>"))
        for key, value in settings(measured).items()
        if value is not None
    ]
    if not rows:
        return [heading("Configuration"), paragraph("Not known: these weights came without one.")]
    return [
        heading("Configuration"),
        folded(f"{len(rows)} keys of the run that have a value", table(["key", "value"], rows)),
    ]


NOTES = Html("""<h2>Definitions</h2>
<p class=note>Intervals of shares: Wilson 1927. Precision: of the images predicted as a class, the share that are; recall: of a
class's images, the share predicted as it; F1: their harmonic mean. ECE and temperature: Guo et al. 2017, arXiv 1706.04599.
Nearest neighbours: cosine votes of weight exp(similarity / 0.07), Wu et al. 2018, arXiv 1805.01978. Corruptions: after
Hendrycks and Dietterich 2019, arXiv 1903.12261. Rollout: Abnar and Zuidema 2020, arXiv 2005.00928. Filters and positions:
figure 7 of Dosovitskiy et al. 2021, arXiv 2010.11929.</p>""")


STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #24292f; --soft: #59636e; --line: #d0d7de; --tile: #f6f8fa;
  --accent: #0b62c4; }
@media (prefers-color-scheme: dark) { :root { --back: #16191e; --text: #d5dae1; --soft: #98a2ae; --line: #3b424c;
  --tile: #1f242b; --accent: #6cb0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1rem 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; }
.note, figcaption, .tiles span { color: var(--soft); font-size: .85rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.6rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tiles div { background: var(--tile); border-radius: .5rem; padding: .6rem .8rem; }
.tiles b, .tiles strong, .tiles span { display: block; }
.tiles b { font-weight: 500; font-size: .9rem; }
.tiles strong { font-size: 1.5rem; line-height: 1.3; }
.wide { overflow-x: auto; }
.figure.wide img { min-width: 36rem; }
img { max-width: 100%; height: auto; }
.pixels { image-rendering: pixelated; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .9rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th { font-weight: 600; }
.n { text-align: right; }
td span { white-space: normal; overflow-wrap: anywhere; }
.bar { display: block; width: 5rem; height: .6rem; background: linear-gradient(to right, var(--accent) calc(var(--f) * 100%),
  var(--tile) 0); }
.heat { display: block; padding: 0 .4rem; text-align: right;
  background: color-mix(in srgb, var(--accent) calc(var(--f) * 55%), transparent); }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .8rem; }
.strips { display: grid; gap: .8rem; }
.gallery img { width: 100%; }
figure { margin: 0; }
figcaption { line-height: 1.3; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--accent); }
"""


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>STYLE</style>
</head>
<body>
<h1>TITLE</h1>
BODY
</body>
</html>
"""
