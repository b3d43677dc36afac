"""One page about a measured model: index.html, which needs no other file.

The page holds its images as data addresses and runs no script; the images also lie beside it as PNG
files. Figures with text are drawn twice, for light and for dark screens.

The values come from vit/report/sections.py, the words and the layout from vit/report/page.html.
"""

from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vit.evaluation.measurements import MeasuredModel
from vit.evaluation.protocol import protocol_line
from vit.files import write_text
from vit.report import sections
from vit.report.sections import Report
from vit.report.values import interval, percent, thousands


def write_report(
    folder: Path, model: MeasuredModel, numbers: dict[str, Any], run: Path | None
) -> Path:
    """Write index.html and the PNG files into a folder that exists; return the page's path.

    model: with its logits recorded.
    numbers: what evaluation.json holds, calibration included.
    run: the run folder that the checkpoint lies in; None where it lies in none.

    Raises OSError.
    """
    report = Report(folder, model, numbers, run)
    # Foreign weights have no configuration, and are called by their file
    name = report.configuration.get("model.name", model.path.stem)
    page = folder / "index.html"
    template = environment().get_template("page.html")
    text = template.render(
        title=f"{name} on {model.images.title}",
        model=model,
        numbers=numbers,
        protocol=protocol_line(model.protocol),
        time=datetime.now(),
        tiles=sections.tiles(report),
        classes=sections.classes(report),
        confusion=sections.confusion(report),
        calibration=sections.calibration(report),
        corruptions=sections.corruptions(report),
        examples=sections.examples(report),
        attention=sections.attention(report),
        patch_filters=sections.patch_filters(report),
        position_embeddings=sections.position_embeddings(report),
        learning_curves=sections.learning_curves(report),
        cost=sections.cost(report),
        configuration=report.configuration,
    )
    write_text(page, text)
    return page


def environment() -> Environment:
    """Jinja2 with the templates of this folder; all values are escaped."""
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["percent"] = percent
    jinja.filters["interval"] = interval
    jinja.filters["thousands"] = thousands
    return jinja
