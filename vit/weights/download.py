"""One file of an address, downloaded once and checked, into the assets of Hugging Face's cache.

It lies there beside a .json that says where it came from and which SHA-256 it has. What a cut
connection leaves is kept, and the next attempt goes on where it ended, also in another process.
"""

import base64
import contextlib
import hashlib
import http.client
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from vit.errors import CheckpointError
from vit.files import lock, read_json, write_json
from vit.weights.disk import CHUNK, disk_errors, hash_file, is_of_disk, require_room

# Attempts in a row that bring nothing new, and the pause between two
ATTEMPTS = 5
PAUSE_SECONDS = 1.0
# Without a byte
TIMEOUT_SECONDS = 30


class Cut(ConnectionError):
    """The server closed the connection before the end. received: bytes of this connection."""

    def __init__(self, there: int, size: int, received: int):
        super().__init__(f"the connection was cut after {there} of {size} bytes")
        self.received = received


@dataclass(frozen=True)
class Download:
    """A file to download. name: as the user gave it, for messages; path: where it is to lie."""

    name: str
    url: str
    path: Path

    @property
    def shown(self) -> str:
        """Its name in messages, with the address where that is another one."""
        return self.name if self.name == self.url else f"{self.name} ({self.url})"

    @property
    def facts(self) -> Path:
        """The JSON file beside it: url and sha256. Where it is, the download is whole."""
        return self.path.with_name(self.path.name + ".json")

    def part(self, version: str | None) -> Path:
        """What has arrived of one version of the file, which the server's ETag tells apart."""
        mark = hashlib.sha256((version or "").encode()).hexdigest()[:12]
        return self.path.with_name(f".{self.path.name}.{mark}.part")


def download(name: str, url: str, sha256: str | None) -> tuple[Path, str]:
    """Return the file of an address, downloaded unless the cache holds it, and its SHA-256.

    sha256: what it must be, or None. Raises CheckpointError.
    """
    from huggingface_hub import cached_assets_path, constants

    # Two addresses may end in the same name
    mark = hashlib.sha256(url.encode()).hexdigest()[:12]
    parts = urlsplit(url)
    base = unquote(PurePosixPath(parts.path).name)
    if not parts.hostname or not base:
        raise CheckpointError(f"{name}: no address of a file; expected https://HOST/PATH/FILE")
    with disk_errors(name, Path(constants.HF_ASSETS_CACHE)):
        folder = cached_assets_path("vit", "weights", f"{parts.hostname}_{mark}")
        task = Download(name, url, folder / base)
        with locked(folder):
            known = known_sha256(task)
            if known is not None and sha256 in (None, known):
                return task.path, known
            if constants.is_offline_mode():
                raise not_to_be_had(task, "HF_HUB_OFFLINE is set")
            return task.path, fetch(task, sha256)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time: the others wait here, and then find the file."""
    with open(folder / ".lock", "a") as file:
        lock(file, wait=True)
        yield


def known_sha256(task: Download) -> str | None:
    """The SHA-256 of a file that was downloaded before; None without one."""
    try:
        facts = read_json(task.facts)
    except (OSError, ValueError):
        return None
    return facts.get("sha256") if task.path.is_file() and facts.get("url") == task.url else None


def fetch(task: Download, sha256: str | None) -> str:
    """Download the file, over a connection that may be cut, and check it; returns its SHA-256."""
    attempts = 0
    while True:
        try:
            part, headers = transfer(task)
            break
        except HTTPError as error:
            raise not_to_be_had(task, f"{error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            if is_of_disk(error):
                raise
            # One that brought something begins the count anew
            attempts = 1 if isinstance(error, Cut) and error.received else attempts + 1
            if attempts == ATTEMPTS:
                reason = error.reason if isinstance(error, URLError) else error
                raise not_to_be_had(task, reason) from None
            time.sleep(PAUSE_SECONDS)
    actual = check(task, part, headers, sha256)
    part.replace(task.path)
    write_json(task.facts, {"url": task.url, "sha256": actual})
    return actual


def transfer(task: Download) -> tuple[Path, Message]:
    """Receive what is missing; returns the whole file's temporary path, and the server's headers.

    Raises HTTPError, Cut, and other errors of the network and the disk.
    """
    with urlopen(Request(task.url), timeout=TIMEOUT_SECONDS) as response:
        headers = response.headers
        version = headers.get("ETag")
        part, size = task.part(version), length_of(headers)
        # Without a version or a size nobody can say what the rest is
        there = part.stat().st_size if version and size and part.is_file() else 0
        require_room(task.name, (size or 0) - there, part.parent)
        if not there:
            receive(response, part, 0, size)
            return part, headers
    if there == size:
        return part, headers
    # If-Range: the whole file comes where it has become another one since
    request = Request(task.url, headers={"Range": f"bytes={there}-", "If-Range": version or ""})
    with urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        start = there if response.status == 206 else 0
        receive(response, part, start, size)
    return part, headers


def length_of(headers: Message) -> int | None:
    length = headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def receive(response: http.client.HTTPResponse, part: Path, start: int, size: int | None) -> None:
    """Write a response after the first `start` bytes of a file, with a progress bar.

    size: of the whole file in bytes, or None where the server does not say. Raises Cut where less
    has come.
    """
    received = start
    with open(part, "r+b" if start else "wb") as file:
        file.seek(start)
        # None: no bar outside a terminal
        with progress_bar(part, start, size) as bar:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    if size is not None and received < size:
        raise Cut(received, size, received - start)


def progress_bar(part: Path, start: int, size: int | None) -> tqdm:
    # .NAME.<mark>.part
    title = part.name[1:].rsplit(".", 2)[0]
    return tqdm(
        desc=title, initial=start, total=size, unit="B", unit_scale=True, disable=None, leave=False
    )


def check(task: Download, part: Path, headers: Message, sha256: str | None) -> str:
    """Return the SHA-256; raise CheckpointError, and remove the file, where a checksum differs.

    sha256: what the user expects. Google's servers send an MD5, which tells damage on the way.
    """
    actual = hash_file(part, "sha256")
    if sha256 not in (None, actual):
        part.unlink()
        raise CheckpointError(
            f"{task.shown}: another file than expected: its SHA-256 is {actual}, not {sha256}"
        )
    sent = sent_md5(headers)
    if sent is not None and hash_file(part, "md5") != sent:
        part.unlink()
        raise CheckpointError(
            f"{task.shown}: arrived damaged (its MD5 is not the server's); try again"
        )
    return actual


def sent_md5(headers: Message) -> str | None:
    """The hexadecimal MD5 in the header `x-goog-hash: crc32c=…,md5=…`, or None."""
    for header in headers.get_all("x-goog-hash") or []:
        for item in header.split(","):
            kind, _, value = item.strip().partition("=")
            if kind == "md5":
                return base64.b64decode(value).hex()
    return None


def not_to_be_had(task: Download, reason: object) -> CheckpointError:
    """The error for a file that neither the server nor the cache gives, with the way by hand."""
    return CheckpointError(
        f"{task.shown}: can't be had ({reason}), and the cache {task.path.parent} does not hold "
        "it; download it on a machine with a network, and give pretrained=FILE here"
    )
