"""Compute the features of images, one vector each, to search, cluster or classify them with.

    python -m vit.embed RUN/checkpoints/best.safetensors photos/ --out features.npz
    find . -name '*.jpg' | python -m vit.embed hf:facebook/dinov2-small --out features.parquet

Features are what the model's head sees: the pooled and normalized output of its encoder. They are
written in the order given, with the images' paths, and their labels where these are known: by the
class folder below a folder that is named, or by the column of a table, parquet files or tar shards.

Images are taken a batch at a time, so that any number of them needs the same memory. What is done
lies in OUT.partial; the same command, started again, goes on there and ends in the same bytes. One
that can't be read is reported on standard error and left out; the exit code is then 2.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit.config.image_options import (
    TOO_LITTLE_MEMORY,
    add_computing,
    check_minima,
    flag_of,
    require_images,
)
from vit.errors import ConfigError, DataError, UserError, run_command, writing_to
from vit.files import check_writable, write_text
from vit.text import escape_unprintable

# torch takes seconds to import, and --help and a mistyped command should answer at once. So torch,
# and the modules of vit that import it, are imported inside the functions that need them.
if TYPE_CHECKING:
    from torch import Tensor

    from vit.data.labeled_sources import Source
    from vit.data.preprocessing import Preprocessing
    from vit.features.embedder import Embedder
    from vit.features.files import FeatureFile
    from vit.features.journal import Journal, State
    from vit.report.similar import Query

SUFFIXES = (".npz", ".parquet")

MAKE_ROOM = "make room, and start the same command again: it goes on where it stopped"

# Of the page of neighbors, unless given
DEFAULT_QUERIES = 12
DEFAULT_NEIGHBORS = 8
# More images make a page that browsers open slowly: ten megabytes or more
MAX_SHOWN = 4000


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m vit.embed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        help="RUN/checkpoints/best.safetensors, or weights as pretrained= takes them: a file, or a "
        "name such as hf:OWNER/NAME or timm:NAME",
    )
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGES",
        help="files, folders (with their subfolders), 'patterns*', tables (.csv, .tsv), parquet "
        "files, tar shards; - or nothing: paths from a pipe, one per line",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="features.npz or features.parquet"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew: discard what an earlier command has begun, and replace its file",
    )
    parser.add_argument(
        "--label-column", metavar="NAME", help="the column with the classes, where it is not found"
    )
    add_computing(parser)
    add_precision(parser)
    add_similar(parser)
    return parser.parse_intermixed_args(arguments)  # IMAGES may follow the options


def add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="of the matrix products; auto: 16 bits where the device is faster with them",
    )


def add_similar(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--similar",
        type=Path,
        metavar="PAGE",
        help="also write an HTML page of some images beside those most similar to each",
    )
    parser.add_argument(
        "--queries",
        nargs="+",
        metavar="IMAGES",
        help="what the page looks for: other images (default: some of the images themselves)",
    )
    parser.add_argument(
        "--num-queries",
        type=int,
        metavar="N",
        help=f"how many of the images, spread evenly (default: {DEFAULT_QUERIES})",
    )
    parser.add_argument(
        "--neighbors",
        type=int,
        metavar="K",
        help=f"how many are shown beside each (default: {DEFAULT_NEIGHBORS})",
    )


def check_options(options: argparse.Namespace) -> None:
    """Raise ConfigError for what can be seen to be wrong before anything is read."""
    check_minima(options, {"batch_size": 1, "workers": 0, "num_queries": 1, "neighbors": 1})
    require_images(options)
    check_similar(options)
    check_outputs(options)


def check_similar(options: argparse.Namespace) -> None:
    """Raise ConfigError for options of the page that would do nothing or too much."""
    for name in ("queries", "num_queries", "neighbors"):
        if options.similar is None and getattr(options, name) is not None:
            raise ConfigError(f"{flag_of(name)} does nothing without --similar PAGE; leave it out")
    if options.queries is not None and options.num_queries is not None:
        raise ConfigError("--num-queries does nothing beside --queries, which are all shown")
    # How many images --queries are is known when they have been found
    at_least = 1 if options.queries is not None else options.num_queries or DEFAULT_QUERIES
    check_shown(at_least, options)


def check_shown(queries: int, options: argparse.Namespace) -> None:
    """Raise ConfigError for so many queries that a browser would open the page slowly."""
    shown = queries * (1 + (options.neighbors or DEFAULT_NEIGHBORS))
    if shown > MAX_SHOWN:
        raise ConfigError(
            f"--similar: the page would hold {shown:,} images, more than {MAX_SHOWN:,}; show fewer "
            "queries or --neighbors"
        )


def check_outputs(options: argparse.Namespace) -> None:
    """Raise ConfigError for a file that can't be written, before anything is computed."""
    # Judged by the extension, so that a checkpoint is never overwritten by mistake
    if options.out.is_dir() or options.out.suffix not in SUFFIXES:
        raise ConfigError(
            f"--out {options.out}: give the name of a file that ends in .npz or .parquet"
        )
    # Started again, the command would take a folder with such a file for one of parquet files
    for folder in options.images if options.out.suffix == ".parquet" else ():
        if os.path.isdir(folder) and options.out.absolute().is_relative_to(os.path.abspath(folder)):
            raise ConfigError(f"--out {options.out}: lies among the images; choose another folder")
    page = options.similar
    if page is not None and (page.is_dir() or page.suffix.lower() not in (".html", ".htm")):
        raise ConfigError(f"--similar {page}: give the name of a file that ends in .html")
    check_writable(options.out)
    if page is not None:
        check_writable(page, "--similar")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    check_options(options)
    embed(options)


def embed(options: argparse.Namespace) -> None:
    """Write the features of all images, or see that they are written, and then the page.

    Raises DataError at the end if some images could not be read.
    """
    from vit.data.labeled_sources import takes_label_column
    from vit.features.embedder import load_embedder
    from vit.features.files import open_features
    from vit.features.journal import STATE
    from vit.runtime.device import start_device
    from vit.runtime.faults import failures_explained

    if options.label_column is not None and not any(map(takes_label_column, options.images)):
        raise ConfigError("--label-column does nothing without a table or parquet files")
    folder = options.out.with_name(f"{options.out.name}.partial")
    is_finished = options.out.exists() and not (folder / STATE).exists()
    finished = None
    if is_finished and not options.overwrite:
        finished = about_finished(options.out)

    device = start_device(options.device, "--device")
    embedder = load_embedder(options.checkpoint, options.precision, device, warn)
    settings = settings_of(embedder, options.batch_size)
    with failures_explained(TOO_LITTLE_MEMORY):
        if finished is not None:
            check_finished(finished, settings, options)
        else:
            make_features(folder, settings, embedder, options)
        file = open_features(options.out)
        if options.similar is not None:
            write_page(file, embedder, options)

    left_out = file.about["left_out"]
    if left_out:
        raise DataError(f"{left_out} of {left_out + file.rows} could not be read, and are left out")


def warn(line: str) -> None:
    """Write a line to standard error, above the bar where there is one."""
    from tqdm import tqdm

    tqdm.write(f"vit.embed: {line}", file=sys.stderr)


def settings_of(embedder: "Embedder", batch_size: int) -> dict[str, Any]:
    """What the bits of the features depend on beside the images.

    The size of a batch is one of them: kernels sum in another order for other shapes.
    """
    return {
        "checkpoint": embedder.checkpoint,
        "width": embedder.width,
        "precision": embedder.precision.name,
        "device": embedder.precision.device.type,
        "batch_size": batch_size,
    }


def sources_of(options: argparse.Namespace) -> "Iterator[Source]":
    from vit.data.labeled_sources import find_sources

    return find_sources(options.images or ["-"], options.label_column)


def about_finished(out: Path) -> dict[str, Any]:
    """What a file says of its features. Raises ConfigError where it is of another kind."""
    from vit.features.files import open_features
    from vit.features.journal import ANEW

    try:
        return open_features(out).about
    except DataError as error:
        raise ConfigError(f"--out {error}; {ANEW}") from None


def check_finished(
    about: dict[str, Any], settings: dict[str, Any], options: argparse.Namespace
) -> None:
    """Raise ConfigError unless the file that is there is what this command would write."""
    from vit.features.journal import ANEW, chain_all, refuse_other_settings

    refuse_other_settings(options.out, about, settings)
    if chain_all(sources_of(options), options.batch_size) != about["images_digest"]:
        raise ConfigError(f"{options.out}: holds features of other images; {ANEW}")
    print(f"{options.out}: complete already")


def make_features(
    folder: Path, settings: dict[str, Any], embedder: "Embedder", options: argparse.Namespace
) -> None:
    """Compute what is not in the folder yet, then write the file. Raises ConfigError, DataError."""
    from vit.features.files import write_features
    from vit.features.journal import Journal

    with writing_to(f"--out {options.out}", MAKE_ROOM):
        journal = Journal(folder, settings, anew=options.overwrite)
    start, done = time.perf_counter(), journal.state.rows
    with contextlib.closing(journal):
        try:
            embed_all(journal, embedder, options)
        except UserError:
            # Nothing to go on from
            if not journal.state.batches:
                journal.remove()
            raise
        state = journal.state
        if not state.rows:
            journal.remove()
            raise DataError("no image could be read" if state.left_out else "no images were named")
        speed = (state.rows - done) / (time.perf_counter() - start)
        with writing_to(f"--out {options.out}", MAKE_ROOM):
            journal.commit()
            write_features(options.out, journal, about_features(state, options.checkpoint))
            journal.remove()
    computed = f"{settings['precision']} on {settings['device']}"
    print(
        f"written to {options.out}: {state.rows:,} images, {state.width} features each, "
        f"{speed:.0f} images/s ({computed})"
    )


def about_features(state: "State", checkpoint: str) -> dict[str, Any]:
    """What a file says of its features; the digest is of all images that were taken."""
    return {
        "model": checkpoint,
        **state.settings,
        "rows": state.rows,
        "left_out": state.left_out,
        "images_digest": state.digest,
    }


def embed_all(journal: "Journal", embedder: "Embedder", options: argparse.Namespace) -> None:
    """Append the features of all images that are not in the journal yet.

    Raises ConfigError where the images that are there are not the first of these.
    """
    from tqdm import tqdm

    from vit.data.labeled_sources import labeled_batches
    from vit.features.journal import ANEW, skip_finished

    sources = sources_of(options)
    if not skip_finished(sources, journal.state, options.batch_size):
        raise ConfigError(f"{journal.folder}: holds features of other images; {ANEW}")
    done = journal.state.rows + journal.state.left_out
    if done:
        print(f"going on after {done:,} images, in {journal.folder}")
    with tqdm(unit=" images", initial=done, leave=False, dynamic_ncols=True, disable=None) as bar:
        for batch in labeled_batches(sources, *how_to_read(embedder, options)):
            for error in batch.errors:
                warn(escape_unprintable(str(error)))
            features = embedder(batch.pixels)
            with writing_to(f"--out {options.out}", MAKE_ROOM):
                journal.append(features, batch.images, batch.sources)
            bar.update(len(batch.sources))


def how_to_read(
    embedder: "Embedder", options: argparse.Namespace
) -> "tuple[Preprocessing, int, int | None]":
    """What labeled_batches() takes beside the images."""
    return embedder.model.preprocessing, options.batch_size, options.workers


def write_page(file: "FeatureFile", embedder: "Embedder", options: argparse.Namespace) -> None:
    """Write the page of queries and their nearest neighbors. Raises DataError, ConfigError."""
    from vit.features.neighbors import spread_evenly, take_rows
    from vit.report.similar import Query, similar_page

    if options.queries is None:
        rows = spread_evenly(file.rows, options.num_queries or DEFAULT_QUERIES)
        images = file.images(rows)
        queries = [Query(image, row) for image, row in zip(images, rows, strict=True)]
        features = take_rows(file, rows)
    else:
        queries, features = embed_queries(embedder, options)
    page = similar_page(file, queries, features, options.neighbors or DEFAULT_NEIGHBORS)
    with writing_to(f"--similar {options.similar}"):
        write_text(options.similar, page)
    size = len(page.encode()) / 1e6
    print(f"{options.similar}: {len(queries)} queries, {size:.1f} MB; open it in a browser")


def embed_queries(
    embedder: "Embedder", options: argparse.Namespace
) -> "tuple[list[Query], Tensor]":
    """The images of --queries and their features, (Q, D). Raises DataError, ConfigError."""
    import torch

    from vit.data.labeled_sources import find_sources, labeled_batches
    from vit.report.similar import Query

    queries: list[Query] = []
    features: list[Tensor] = []
    sources = find_sources(options.queries)
    for batch in labeled_batches(sources, *how_to_read(embedder, options)):
        # A page without one of its queries would mislead
        for error in batch.errors:
            raise DataError(f"--queries: {error}")
        queries += [Query(image, None) for image in batch.images]
        features.append(torch.from_numpy(embedder(batch.pixels)))
        check_shown(len(queries), options)
    return queries, torch.cat(features)


if __name__ == "__main__":
    sys.exit(run_command("vit.embed", main))
