"""Single images out of parquet files, such as Hugging Face's image data sets.

An image in a parquet file has a path, "FILE.parquet!GROUP+ROW": a row within a row group, counted
from 0. A row group is the least that can be read, so an image at random costs the reading of its
group's image column (some hundred images in the files of Hugging Face); images in order cost one
reading a group.
"""

import functools
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

PARQUET_ROW = re.compile(r"(.*\.parquet)!(\d+)\+(\d+)", re.DOTALL | re.IGNORECASE)


def open_file(path: str) -> "ParquetFile":
    """A parquet file whose footer has been read.

    Raises DataError where pyarrow is not installed, and its OSError or ValueError for a file that
    is missing or damaged.
    """
    # Imported for the data sets that need it alone, since it takes long
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path}: reading parquet files needs pyarrow; install it (pip install pyarrow)"
        ) from None
    return pyarrow.parquet.ParquetFile(path, memory_map=True)


def image_columns(schema: "pyarrow.Schema") -> list[str]:
    """The columns that may hold images: of bytes, or of structs with a field `bytes`."""
    return [column.name for column in schema if holds_bytes(column.type)]


def holds_bytes(kind: Any) -> bool:
    """Whether a pyarrow type is one of images as bytes, or as Hugging Face's {bytes, path}."""
    from pyarrow import types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
    return types.is_binary(kind) or types.is_large_binary(kind)


# Open files keep their footers, which hold a data set's statistics: few, so that memory stays small
@functools.lru_cache(maxsize=16)
def opened(path: str) -> "ParquetFile":
    return open_file(path)


# Images in order need one group at a time; the second is for a batch that begins in another
@functools.lru_cache(maxsize=2)
def read_group(path: str, group: int) -> "pyarrow.ChunkedArray":
    """The images of a row group, as binary values. Raises OSError or ValueError."""
    file = opened(path)
    (name,) = image_columns(file.schema_arrow)
    # One thread: a worker process has one core, and inherits no threads of its parent
    column = file.read_row_group(group, columns=[name], use_threads=False).column(0)
    # Hugging Face's images are {bytes, path}
    position = column.type.get_field_index("bytes") if column.type.num_fields else None
    return column if position is None else column.flatten()[position]


def open_row(path: str) -> io.BytesIO:
    """The encoded image at "FILE.parquet!GROUP+ROW".

    Raises FileNotFoundError for a path of another form, OSError or ValueError where the file is
    damaged, and ValueError for a row without bytes.
    """
    match = PARQUET_ROW.fullmatch(path)
    if match is None:
        raise FileNotFoundError(path)
    file, group, row = match.groups()
    content = read_group(file, int(group))[int(row)].as_py()
    if content is None:
        raise ValueError("this row holds no bytes of an image")
    return io.BytesIO(content)


def is_parquet(path: Path) -> bool:
    """Whether a path is that of a parquet file, by its extension."""
    return path.suffix.lower() == ".parquet" and not path.is_dir()
