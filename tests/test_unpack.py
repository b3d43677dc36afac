"""Archives as they are downloaded: unpacked whole, safely, and again after an interruption."""

import gzip
import io
import os
import tarfile
import zipfile

import pytest
from helpers import ROOT, error_line, run
from small_imagenet import EXPECTED, WNIDS, image_name, load_imagenet, write_devkit

from vit.errors import ConfigError, DataError
from vit.unpack import main, unpack

FILES = {"cat/1.jpg": b"a cat" * 1000, "dog/1.jpg": b"a dog", "dog/empty.jpg": b""}


def tar_bytes(files, mode="w"):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, data in files.items():
            zipped.writestr(name, data)
    return path


def write_archive(folder, kind, files=None):
    """An archive of these files; kind is its extension."""
    files = FILES if files is None else files
    path = folder / f"archive.{kind}"
    if kind == "zip":
        return write_zip(path, files)
    compression = kind.removeprefix("tar").removeprefix(".")
    path.write_bytes(tar_bytes(files, f"w:{compression}"))
    return path


def files_in(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


KINDS = ["tar", "tar.gz", "tar.bz2", "tar.xz", "zip"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_written_and_again_only_what_is_missing(tmp_path, kind, capsys):
    archive = write_archive(tmp_path, kind)
    out = tmp_path / "out"
    main([str(archive), str(out)])
    assert files_in(out) == FILES
    assert capsys.readouterr().out == f"3 files in {out}\n"
    (out / "dog/1.jpg").unlink()
    (out / "cat/1.jpg").write_bytes(b"cut short")
    main([str(archive), str(out)])
    assert files_in(out) == FILES
    assert capsys.readouterr().out == f"3 files in {out}, 1 of which were there already\n"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "/tmp/evil.jpg", "C:\\evil"])
def test_nothing_is_written_outside_of_the_folder(tmp_path, kind, name):
    (tmp_path / "in").mkdir()
    archive = write_archive(tmp_path / "in", kind, {name: b"evil"})
    with pytest.raises(DataError, match="would be written outside of the folder; do not trust"):
        unpack(archive, tmp_path / "in" / "out")
    assert {path.name for path in tmp_path.rglob("*")} <= {"in", archive.name, "out"}


def test_links_are_left_out(tmp_path, capsys):
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    inside = tarfile.TarInfo("link/passwd")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(link)
        tar.addfile(inside, io.BytesIO())
    main([str(tmp_path / "a.tar"), str(tmp_path / "out")])
    assert capsys.readouterr().out.endswith("; 1 links were left out\n")
    assert not (tmp_path / "out" / "link").is_symlink()
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.writestr(info, "/etc")
    assert unpack(tmp_path / "a.zip", tmp_path / "other").links == 1


def test_the_second_files_of_macs_are_left_out(tmp_path):
    files = {"pets/cat/1.jpg": b"a cat", "__MACOSX/pets/cat/._1.jpg": b"no image"}
    unpack(write_zip(tmp_path / "a.zip", files), tmp_path / "out")
    assert files_in(tmp_path / "out") == {"pets/cat/1.jpg": b"a cat"}


def test_imagenet_as_it_is_downloaded(tmp_path):
    """A tar of one tar for each class, a flat tar, and the development kit."""
    classes = {
        f"{wnid}.tar": tar_bytes({f"{wnid}_{number}.JPEG": b"image" for number in range(4)})
        for wnid in WNIDS
    }
    images = {f"{image_name(number)}.JPEG": b"image" for number in range(1, 5)}
    write_devkit(tmp_path)
    (tmp_path / "train.tar").write_bytes(tar_bytes(classes))
    (tmp_path / "val.tar").write_bytes(tar_bytes(images))
    with tarfile.open(tmp_path / "devkit.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")

    root = tmp_path / "imagenet"
    for archive, out in (("train.tar", "train"), ("val.tar", "val"), ("devkit.tar.gz", ".")):
        unpack(tmp_path / archive, root / out)
    data = load_imagenet(root, val_fraction=0.25)
    assert data.classes == WNIDS
    assert [len(data.train), len(data.val), len(data.test)] == [9, 3, 4]
    assert data.test.labels.tolist() == EXPECTED


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_that_is_cut_short_is_refused_and_what_was_whole_is_kept(tmp_path, kind):
    # Does not shrink, so that half of the archive is half of the files
    files = {f"{number}.jpg": os.urandom(9000) for number in range(20)}
    archive = write_archive(tmp_path, kind, files)
    archive.write_bytes(archive.read_bytes()[: 11 * 9000])
    with pytest.raises(DataError, match=rf"archive\.{kind}: not a whole tar or zip archive"):
        unpack(archive, tmp_path / "out")
    found = files_in(tmp_path / "out")
    assert found.items() <= files.items()
    assert len(found) >= (9 if kind in ("tar", "tar.gz") else 0)


@pytest.mark.parametrize("length", [512 * 2, 512 * 2 + 100])
def test_a_tar_that_ends_between_two_files_is_refused(tmp_path, length):
    """tarfile itself takes it for the end."""
    content = tar_bytes({"1.jpg": b"one", "2.jpg": b"two"})
    (tmp_path / "a.tar").write_bytes(content[:length])
    with pytest.raises(DataError, match=r"breaks off or is damaged at byte 1,024"):
        unpack(tmp_path / "a.tar", tmp_path / "out")
    assert files_in(tmp_path / "out") == {"1.jpg": b"one"}


def test_a_damaged_file_in_a_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.writestr("1.jpg", b"content")
    damaged = (tmp_path / "a.zip").read_bytes().replace(b"content", b"CONTENT")
    (tmp_path / "a.zip").write_bytes(damaged)
    with pytest.raises(DataError, match=r"a\.zip: not a whole .*CRC"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert files_in(tmp_path / "out") == {}


# Without the time, or the processes that run the tests in parallel would name the last differently
NO_ARCHIVES = [b"", b"no archive", gzip.compress(b"no tar", mtime=0)]


@pytest.mark.parametrize("content", NO_ARCHIVES, ids=["empty", "text", "gzip of text"])
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar: not a whole tar or zip archive"):
        unpack(tmp_path / "a.tar", tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    archive = write_archive(tmp_path, "tar")
    (tmp_path / "out").write_bytes(b"a file")
    with pytest.raises(ConfigError, match=r"out/cat/1\.jpg: can't write there"):
        unpack(archive, tmp_path / "out")


def test_a_missing_archive_is_one_line(tmp_path):
    line = error_line(run("vit.unpack", str(tmp_path / "none.tar"), "out", cwd=ROOT))
    assert line == f"vit.unpack: {tmp_path}/none.tar: no such file"
