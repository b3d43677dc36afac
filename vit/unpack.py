"""Unpack an archive of images, as it was downloaded, into a folder.

    python -m vit.unpack ILSVRC2012_img_train.tar data/imagenet/train
    python -m vit.unpack ILSVRC2012_img_val.tar data/imagenet/val
    python -m vit.unpack tiny-imagenet-200.zip data

ARCHIVE is a tar (also .tar.gz, .tgz, .tar.bz2, .tar.xz) or a zip. A tar inside a tar, as one for
each class in ImageNet's, becomes a folder of its name. Each file is written whole or not at all,
and one that is there already in its full size is left: an interrupted command can be started again.
Nothing is written outside of OUT: an archive with such a name in it is refused, links are left out.
"""

import argparse
import contextlib
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from vit.errors import DataError, UserError, run_command, writing_to
from vit.files import atomic_write, require_end

# What the readers raise for an archive that is cut short or damaged; RuntimeError: encrypted
BROKEN = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    LZMAError,
)
CHUNK = 1 << 20  # bytes that are copied at once


@dataclass(frozen=True)
class Member:
    """A file in an archive: its path in OUT, its size in bytes, and how to open it."""

    path: PurePosixPath
    size: int
    open: Callable[[], IO[bytes] | None]


@dataclass
class Counts:
    """What became of the members of an archive."""

    written: int = 0
    kept: int = 0  # there already
    links: int = 0  # and devices, which are left out


def safe_path(name: str, archive: Path) -> PurePosixPath:
    """A member's path, relative and without "..". Raises DataError for any other."""
    path = PurePosixPath(name.replace("\\", "/"))
    # A colon would name a drive of Windows
    if path.is_absolute() or ".." in path.parts or "\0" in name or ":" in (path.parts or ("",))[0]:
        raise DataError(
            f"{archive}: holds {name!r}, which would be written outside of the folder; do not "
            "trust this archive"
        )
    return path


def tar_members(archive: Path, file: IO[bytes], counts: Counts) -> Iterator[Member]:
    """Yield the files of a tar, and those of each tar in it, in their order.

    Raises DataError for an unsafe name, and one of BROKEN for a tar that is damaged or cut short.
    """
    with tarfile.open(fileobj=file, mode="r:*") as tar:
        for member in tar:
            path = safe_path(member.name, archive)
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None and path.suffix.lower() == ".tar":
                for inner in tar_members(archive, content, counts):
                    yield Member(path.with_suffix("") / inner.path, inner.size, inner.open)
            elif content is not None:
                yield Member(path, member.size, lambda content=content: content)
            elif not member.isdir():
                counts.links += 1
            # tarfile keeps every header for later, of a million files too
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
        require_end(tar)


def zip_members(archive: Path, file: IO[bytes], counts: Counts) -> Iterator[Member]:
    """Yield the files of a zip. Raises DataError for an unsafe name, and one of BROKEN."""
    with zipfile.ZipFile(file) as zipped:
        infos = zipped.infolist()
        # All are known beforehand, so nothing is written from an archive that is refused
        paths = [safe_path(info.filename, archive) for info in infos]
        for info, path in zip(infos, paths, strict=True):
            is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
            if is_link:
                counts.links += 1
            elif not info.is_dir():
                yield Member(path, info.file_size, lambda info=info: zipped.open(info))


def unpack(archive: Path, out: Path) -> Counts:
    """Write all files of an archive below a folder, with a bar on a terminal.

    Raises DataError where the archive is missing, damaged or unsafe; what was whole is written.
    """
    counts = Counts()
    with reading(archive), open(archive, "rb") as file:
        # Not the other way round: a tar that ends in a zip looks like a zip
        members = tar_members if tarfile.is_tarfile(file) else zip_members
        file.seek(0)
        # Where the file is read is how far it is, however well it is compressed
        with tqdm(
            total=archive.stat().st_size,
            unit="B",
            unit_scale=True,
            desc=archive.name,
            leave=False,
            dynamic_ncols=True,
            disable=None,
        ) as bar:
            for member in members(archive, file, counts):
                # Macs add a second file to each
                if member.path.parts[:1] != ("__MACOSX",):
                    write_member(archive, member, out / member.path, counts)
                bar.update(max(0, file.tell() - bar.n))
    return counts


@contextlib.contextmanager
def reading(archive: Path) -> Iterator[None]:
    """Turn what the readers raise for a damaged archive into a DataError."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise DataError(f"{archive}: no such file") from None
    except BROKEN as error:
        raise DataError(
            f"{archive}: not a whole tar or zip archive ({error}); download it again and start "
            "this command again: files that are there already are kept"
        ) from None


def chunks(archive: Path, member: Member) -> Iterator[bytes]:
    """Yield the content of a member piece by piece. Raises DataError where it is damaged."""
    size = 0
    with reading(archive):
        source = member.open()
        assert source is not None
        with source:
            while chunk := source.read(CHUNK):
                size += len(chunk)
                yield chunk
        if size != member.size:
            raise EOFError(f"{member.path} is cut short")


def write_member(archive: Path, member: Member, target: Path, counts: Counts) -> None:
    """Write one file, unless it is there in its full size.

    Raises ConfigError where it can't be written, and DataError for a damaged member.
    """
    with writing_to(target, "choose another folder, or make room"):
        if target.is_file() and target.stat().st_size == member.size:
            counts.kept += 1
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as temporary, open(temporary, "wb") as file:
            # What fails in reading is a DataError, which is not taken for a failure to write
            file.writelines(chunks(archive, member))
    counts.written += 1


def parse_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vit.unpack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("archive", type=Path, help="a tar or zip, compressed or not")
    parser.add_argument("out", type=Path, help="the folder to write into; made if it is missing")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    options = parse_arguments(given)
    counts = unpack(options.archive, options.out)
    line = f"{counts.written + counts.kept:,} files in {options.out}"
    if counts.kept:
        line += f", {counts.kept:,} of which were there already"
    if counts.links:
        line += f"; {counts.links:,} links were left out"
    print(line)


if __name__ == "__main__":
    sys.exit(run_command("vit.unpack", main))
