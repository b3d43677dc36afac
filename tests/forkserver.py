"""Start the trainer's programs from one warm parent.

`python train.py` spends seconds on imports before it does anything, and the tests start more
than a hundred programs. So one process, the server (forkserver_main.py), imports everything once,
and every program is a fork of it: a process of its own, with its own pid, streams, environment,
signals and exit code, which runs the script as `__main__` and ends as the interpreter ends.

A program that is forked differs from one started from scratch in this: what an import prints or
warns of is not seen; all programs of one server have the same hash seed; and
`/proc/<pid>/cmdline` shows the server. Where these matter, or the environment at import time
(see `READ_AT_IMPORT`), a process must be started from scratch.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

MAIN = Path(__file__).with_name("forkserver_main.py")

# First letters of the variables that Python and the libraries read while they start
READ_AT_IMPORT = (
    "ATEN_",
    "CUDA_",
    "DNNL_",
    "GOMP_",
    "KMP_",
    "LD_",
    "MKL_",
    "OMP_",
    "OPENBLAS_",
    "PYTHON",
)


class ForkServer:
    """The warm parent, for as long as this object (or the process that holds it) lives."""

    def __init__(self) -> None:
        self.environment = import_environment(os.environ)
        self._control, other_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other_end:
            self._server = subprocess.Popen(
                [sys.executable, str(MAIN), str(other_end.fileno())],
                pass_fds=[other_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    @property
    def pid(self) -> int:
        return self._server.pid

    def can_start(self, environment: Mapping[str, str]) -> bool:
        """Whether Python and the libraries would start in this environment as the server did."""
        return import_environment(environment) == self.environment

    def start(
        self,
        program: str | Path,
        *arguments: str,
        cwd: Path,
        environment: Mapping[str, str] | None = None,
        stdin: int | IO = subprocess.DEVNULL,
        stdout: int | IO = subprocess.PIPE,
        stderr: int | IO = subprocess.PIPE,
        new_session: bool = False,
    ) -> "ForkedProcess":
        """Start a script (its path ends in .py) or a module.

        environment: all of it, that of this process where None. The streams are given as to
        `subprocess.Popen`.
        """
        request = {
            "program": str(program),
            "arguments": arguments,
            "cwd": str(cwd),
            "environment": dict(os.environ if environment is None else environment),
            "new_session": new_session,
        }
        channel, other_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with (
            other_end,
            Stream(stdin, 0) as zero,
            Stream(stdout, 1) as one,
            Stream(stderr, 2) as two,
        ):
            descriptors = [zero.descriptor, one.descriptor, two.descriptor, other_end.fileno()]
            with died_if_disconnected():
                socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
        command = [str(program), *arguments]
        return ForkedProcess(command, channel, zero.file, one.file, two.file)

    def close(self) -> None:
        """Let the server end; programs that it has started go on."""
        self._control.close()
        self._server.wait()


@contextlib.contextmanager
def died_if_disconnected() -> Iterator[None]:
    """Raise RuntimeError where the server is not there; its own error is on standard error."""
    try:
        yield
    except ConnectionError as error:
        raise RuntimeError("the fork server has died") from error


def import_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that matters while Python and the libraries start."""
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


class Stream:
    """One of a program's three streams: what `subprocess.Popen` takes, opened until it is sent.

    descriptor: the program's end. file: our end, None where it is no pipe.
    """

    def __init__(self, given: int | IO, number: int):
        self.file: IO[str] | None = None
        self._opened = given in (subprocess.PIPE, subprocess.DEVNULL)
        if given == subprocess.PIPE:
            reading, writing = os.pipe()
            ours, self.descriptor = (writing, reading) if number == 0 else (reading, writing)
            self.file = os.fdopen(ours, "w" if number == 0 else "r")
        elif given == subprocess.DEVNULL:
            self.descriptor = os.open(os.devnull, os.O_RDWR)
        else:
            self.descriptor = given if isinstance(given, int) else given.fileno()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._opened:
            os.close(self.descriptor)


class ForkedProcess:
    """A program that was forked from the server, with the interface of `subprocess.Popen`."""

    def __init__(
        self,
        args: list[str],
        channel: socket.socket,
        stdin: IO[str] | None,
        stdout: IO[str] | None,
        stderr: IO[str] | None,
    ):
        self.args = args
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self.returncode: int | None = None
        self._readers: list[Reader] = []
        self._channel = channel
        self.pid = self._receive()

    def __enter__(self) -> "ForkedProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._channel], [], [], 0)[0]:
            self.returncode = self._receive()
            self._channel.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            select.select([self._channel], [], [], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """Read both streams to their ends and wait; after a TimeoutExpired, call it again."""
        if not self._readers:
            self._readers = [Reader(self.stdout), Reader(self.stderr)]
        deadline = None if timeout is None else time.monotonic() + timeout
        for reader in self._readers:
            reader.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        output, errors = (reader.text for reader in self._readers)
        return output, errors

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _receive(self) -> int:
        """The next number the server reports: the pid, then the exit code."""
        with died_if_disconnected():
            message = self._channel.recv(64)
            if not message:
                raise ConnectionError
        return int(message)


class Reader(threading.Thread):
    """Reads a stream to its end in the background; text is None where there is no stream."""

    def __init__(self, stream: IO[str] | None):
        super().__init__(daemon=True)
        self._stream = stream
        self.text: str | None = None
        self.start()

    def run(self) -> None:
        if self._stream is not None:
            with self._stream:
                self.text = self._stream.read()
