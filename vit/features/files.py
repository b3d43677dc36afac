"""Files of features: .npz for NumPy and .parquet for everything else, written and read in blocks.

    features    float32 (n, D)
    paths       text (n,), as the images were named; in parquet the column is called path
    labels      text (n,), the names of the classes, empty where there is none; missing where no
                image has one; in parquet the column is called label, and null where there is none
    about       JSON: what the features were computed with; in parquet it is metadata, under "vit"

`np.load(FILE)["features"]` reads all features into memory. `open_features(FILE)` reads blocks, and
maps those of an .npz, whose members are stored uncompressed and aligned.
"""

import json
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vit.data.labeled_sources import LabeledImage
from vit.errors import DataError
from vit.features.journal import Journal
from vit.files import atomic_write

FORMAT = "vit-features-1"

# Bytes of features that are held at a time
BLOCK_BYTES = 2**22

# Members begin at multiples of so many bytes, as NumPy's files pad their headers
ALIGNMENT = 64
# A zip's field for padding (of Android's zipalign), and the size of a local header with zip64 sizes
PADDING_FIELD = 0xD935
LOCAL_HEADER = 30
ZIP64_FIELD = 20
# Equal features give equal files
FIXED_TIME = (1980, 1, 1, 0, 0, 0)


class FeatureFile(Protocol):
    """A file of features, opened for reading.

    about: what the features were computed with; rows: n; width: D.
    """

    about: dict[str, Any]
    rows: int
    width: int

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all features in order, float32 (some rows, D)."""
        ...

    def images(self, rows: Sequence[int]) -> list[LabeledImage]:
        """The images of these rows, in their order."""
        ...


def block_rows(width: int) -> int:
    """How many rows of D numbers a block has."""
    return max(1, BLOCK_BYTES // (4 * width))


def write_features(out: Path, journal: Journal, about: dict[str, Any]) -> None:
    """Write all rows of a journal in the format of the extension, whole or not at all.

    Raises OSError.
    """
    write = write_npz if out.suffix == ".npz" else write_parquet
    with atomic_write(out, durable=True) as temporary:
        write(temporary, journal, {"format": FORMAT} | about)


def write_npz(path: Path, journal: Journal, about: dict[str, Any]) -> None:
    state = journal.state
    rows, step = state.rows, block_rows(state.width)
    with zipfile.ZipFile(path, "w") as archive:
        features = journal.feature_blocks(step)
        write_member(archive, "features", "<f4", (rows, state.width), features)
        paths = ([image.path for image in block] for block in journal.image_blocks(step))
        write_member(archive, "paths", f"<U{state.longest_path}", (rows,), paths)
        # None where no image has one
        if state.longest_label:
            labels = ([image.label for image in block] for block in journal.image_blocks(step))
            write_member(archive, "labels", f"<U{state.longest_label}", (rows,), labels)
        text = json.dumps(about)
        write_member(archive, "about", f"<U{len(text)}", (), [text])


def write_member(
    archive: zipfile.ZipFile,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    blocks: Iterable[Any],
) -> None:
    """Write an array to NAME.npy from its blocks along the first axis."""
    info = zipfile.ZipInfo(f"{name}.npy", FIXED_TIME)
    # So that the array can be mapped: BLAS copies one that is not aligned
    start = archive.start_dir + LOCAL_HEADER + len(info.filename) + ZIP64_FIELD + 6
    padding = -start % ALIGNMENT
    info.extra = struct.pack("<HHH", PADDING_FIELD, 2 + padding, ALIGNMENT) + bytes(padding)
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    with archive.open(info, "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for block in blocks:
            member.write(np.asarray(block, dtype).tobytes())


def write_parquet(path: Path, journal: Journal, about: dict[str, Any]) -> None:
    """One block is one row group."""
    # Late, since importing it starts a thread, which processes that are forked would lack
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    state = journal.state
    step = block_rows(state.width)
    columns = [("path", pa.string()), ("label", pa.string())]
    if not state.longest_label:
        del columns[1]
    columns.append(("features", pa.list_(pa.float32(), state.width)))
    schema = pa.schema(columns, metadata={"vit": json.dumps(about)})
    # Numbers without a pattern: neither a dictionary nor compression makes them smaller
    options = {"compression": "none", "use_dictionary": ["label"], "write_statistics": False}
    with ParquetWriter(path, schema, **options) as writer:
        blocks = zip(journal.image_blocks(step), journal.feature_blocks(step), strict=True)
        for images, features in blocks:
            values = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), state.width)
            arrays: dict[str, Any] = {
                "path": [as_utf8(image.path) for image in images],
                "label": [as_utf8(image.label) or None for image in images],
                "features": values,
            }
            table = pa.table({name: arrays[name] for name in schema.names}, schema=schema)
            writer.write_table(table, row_group_size=step)


def as_utf8(text: str) -> str:
    """The text, with bytes of a file name that are no UTF-8 written as \\xe9."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def open_features(path: Path | str) -> FeatureFile:
    """Open a file that vit.embed wrote. Raises DataError for any other."""
    path = Path(path)
    try:
        return NpzFeatures(path) if path.suffix == ".npz" else ParquetFeatures(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, struct.error):
        raise DataError(f"{path}: not a file of features that vit.embed wrote") from None


class NpzFeatures:
    """An .npz of features; `features` is the whole array, mapped from the disk.

    Raises OSError, ValueError, KeyError or BadZipFile for another file.
    """

    def __init__(self, path: Path):
        self.path = path
        with zipfile.ZipFile(path) as archive:
            members = set(archive.namelist())
            self.about = json.loads(map_member(archive, "about").item())
            require_format(self.about)
            self.features = map_member(archive, "features")
            self.paths = map_member(archive, "paths")
            self.labels = map_member(archive, "labels") if "labels.npy" in members else None
        self.rows, self.width = self.features.shape

    def blocks(self) -> Iterator[np.ndarray]:
        # Read, since pages that are mapped would count as this process's memory
        step, size = block_rows(self.width), 4 * self.width
        with open(self.path, "rb") as file:
            file.seek(self.features.offset)
            for start in range(0, self.rows, step):
                block = file.read(size * min(step, self.rows - start))
                yield np.frombuffer(block, "<f4").reshape(-1, self.width)

    def images(self, rows: Sequence[int]) -> list[LabeledImage]:
        labels = self.labels
        return [
            LabeledImage(str(self.paths[row]), "" if labels is None else str(labels[row]))
            for row in rows
        ]


def map_member(archive: zipfile.ZipFile, name: str) -> np.memmap:
    """An array of an .npz, mapped. Raises KeyError or ValueError where that can't be done."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    with open(str(archive.filename), "rb") as file:
        # The local header says how long its own extra field is
        file.seek(info.header_offset)
        name_size, extra_size = struct.unpack("<26xHH", file.read(LOCAL_HEADER))
        file.seek(name_size + extra_size, 1)
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return np.memmap(file, dtype, "r", file.tell(), shape)


class ParquetFeatures:
    """A parquet file of features. Raises OSError, ValueError or KeyError for another file."""

    def __init__(self, path: Path):
        from pyarrow.parquet import ParquetFile

        self.file = ParquetFile(path)
        schema = self.file.schema_arrow
        self.about = json.loads((schema.metadata or {})[b"vit"])
        require_format(self.about)
        self.rows = self.file.metadata.num_rows
        self.width = schema.field("features").type.list_size
        self.columns = [name for name in ("path", "label") if name in schema.names]

    def blocks(self) -> Iterator[np.ndarray]:
        for group in range(self.file.num_row_groups):
            column = self.file.read_row_group(group, columns=["features"]).column(0)
            yield column.combine_chunks().flatten().to_numpy().reshape(-1, self.width)

    def images(self, rows: Sequence[int]) -> list[LabeledImage]:
        found: dict[int, LabeledImage] = {}
        start = 0
        for group in range(self.file.num_row_groups):
            end = start + self.file.metadata.row_group(group).num_rows
            wanted = [row for row in rows if start <= row < end]
            if wanted:
                table = self.file.read_row_group(group, columns=self.columns)
                for row in wanted:
                    values = table.slice(row - start, 1).to_pylist()[0]
                    found[row] = LabeledImage(values["path"], values.get("label") or "")
            start = end
        return [found[row] for row in rows]


def require_format(about: dict[str, Any]) -> None:
    """Raise ValueError for a file of another program or version."""
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError("another format")
