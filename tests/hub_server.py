"""A small server on 127.0.0.1 that speaks the Hugging Face hub's protocol, and serves plain files.

What the client asks for: the list of a repository's files at /api/models/…, then each file at
/<repository>/resolve/<revision>/<file>, which for large ones leads to /cdn/<sha256>.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# The client follows a hub's own redirects, but must read one to another host, as the real one's is
HOST, CDN_HOST = "127.0.0.1", "localhost"
# The hub keeps these in git itself
SMALL_FILES = (".json",)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Hub:
    """What the server serves, and how it misbehaves.

    repositories: {OWNER/NAME: {file: content}}, each at COMMIT. files: plain ones by their path.
    gated, private: repositories that want a token. cuts: how many responses in a row end after
    `cut_after` bytes. damage: whether the last byte of large files is wrong. requests: "METHOD
    path" of each.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = "secret"
    cuts: int = 0
    cut_after: int = 1000
    damage: bool = False
    status: int | None = None
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def requested(self, start: str) -> list[str]:
        """The paths of the requests that begin like "GET /cdn"."""
        return [line.partition(" ")[2] for line in self.requests if line.startswith(start)]

    def listing(self, repository: str) -> dict:
        """The answer of /api/models/<repository>."""
        siblings = []
        for name, content in self.repositories[repository].items():
            entry = {"rfilename": name, "size": len(content), "blobId": git_id(content)}
            if not name.endswith(SMALL_FILES):
                entry["lfs"] = {
                    "sha256": sha256(content),
                    "size": len(content),
                    "pointerSize": 134,
                }
            siblings.append(entry)
        return {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.status is not None:
            self.fail(self.hub.status)
        elif path.startswith("/api/models/"):
            self.answer_listing(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            self.answer_file(path.removeprefix("/"))
        elif path.startswith("/cdn/"):
            contents = [c for files in self.hub.repositories.values() for c in files.values()]
            content = next(c for c in contents if sha256(c) == path.removeprefix("/cdn/"))
            self.send(self.damaged(content), {"ETag": f'"{sha256(content)}"'})
        elif path in self.hub.files:
            content = self.hub.files[path]
            etag = f'"{sha256(content)[:8]}"'
            self.send(self.damaged(content), {"ETag": etag, **self.hub.headers})
        else:
            self.fail(404)

    def damaged(self, content: bytes) -> bytes:
        """A file as it is sent."""
        return content[:-1] + bytes([content[-1] ^ 1]) if self.hub.damage else content

    def answer_listing(self, path: str) -> None:
        repository, _, revision = path.partition("/revision/")
        if self.is_open(repository, revision or "main"):
            self.send(json.dumps(self.hub.listing(repository)).encode(), {})

    def answer_file(self, path: str) -> None:
        repository, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        if not self.is_open(repository, revision):
            return
        if repository in self.hub.gated and not self.is_authorized():
            self.fail(403 if "Authorization" in self.headers else 401, "GatedRepo")
            return
        content = self.hub.repositories[repository].get(name)
        if content is None:
            self.fail(404, "EntryNotFound")
            return
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{git_id(content)}"'}
        if name.endswith(SMALL_FILES):
            self.send(content, headers)
            return
        headers |= {
            "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{sha256(content)}"',
            "Location": f"{self.hub.url.replace(HOST, CDN_HOST)}/cdn/{sha256(content)}",
        }
        self.send(b"", headers, status=302)

    def is_authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def is_open(self, repository: str, revision: str) -> bool:
        """Whether there is such a repository and revision; else it is told so."""
        if repository not in self.hub.repositories:
            self.fail(401, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self.fail(404, "RevisionNotFound")
        else:
            return True
        return False

    def fail(self, status: int, code: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": "no"} if code else {}
        self.send(b"", headers, status=status)

    def send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        """Send all of a content, or the part that is asked for, whole or cut."""
        total, start = len(content), 0
        wanted = self.headers.get("Range")
        if wanted and status == 200:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers = {**headers, "Content-Range": f"bytes {start}-{total - 1}/{total}"}
            status = 206
        body = content[start:]
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cuts and len(body) > self.hub.cut_after:
            self.hub.cuts -= 1
            self.wfile.write(body[: self.hub.cut_after])
            self.close_connection = True
            return
        self.wfile.write(body)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve until the block ends; sets hub.url."""
    handler = type("HandlerOfHub", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer((HOST, 0), handler)
    hub.url = f"http://{HOST}:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
