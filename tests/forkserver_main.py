"""The server of forkserver.py: imports what the trainer needs, then forks a program per request.

python tests/forkserver_main.py DESCRIPTOR    # of the socket over which the requests come
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import numpy as np

ROOT = Path(__file__).parent.parent

# What train.py and evaluate.py import, some of it late. No import may start a thread or compute
# in parallel: a fork would wait for threads that it does not have.
WARM_MODULES = [
    "hydra",
    "PIL.Image",
    "safetensors.torch",
    "scipy.optimize",
    "sklearn.datasets",
    "torch._dynamo",
    "torch.distributed",
    "torch.utils.data",
    "torch.utils.tensorboard",
    "torchvision.transforms.v2",
]


class Request(NamedTuple):
    """A program to run: `content` is what `ForkServer.start` was given, `streams` are 0, 1, 2."""

    content: dict[str, Any]
    streams: list[int]


class Server:
    """Forks a program for each request and reports its pid, and later its exit code."""

    def __init__(self, control: socket.socket):
        self._control = control
        self._running: dict[int, socket.socket] = {}
        # A signal that a child has ended wakes the server through this pair
        self._awake, self._waker = socket.socketpair()
        self._waker.setblocking(False)

    def serve(self) -> Request:
        """Serve until the other side closes its socket; returns in the forked programs only."""
        signal.set_wakeup_fd(self._waker.fileno())
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest and the programs
        with DefaultSelector() as selector:
            selector.register(self._control, EVENT_READ)
            selector.register(self._awake, EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._awake in ready:
                    self._awake.recv(4096)
                    self._report_ended()
                if self._control in ready:
                    request = self._receive()
                    if request is not None:
                        return request

    def _receive(self) -> Request | None:
        """Fork for the next request; the program gets it, the server None."""
        message, descriptors, _, _ = socket.recv_fds(self._control, 1 << 20, 4)
        if not message:
            sys.exit()
        *streams, channel_descriptor = descriptors
        channel = socket.socket(fileno=channel_descriptor)
        pid = os.fork()
        if pid == 0:
            channel.close()
            self._close()
            return Request(json.loads(message), streams)
        for stream in streams:
            os.close(stream)
        self._running[pid] = channel
        channel.send(str(pid).encode())
        return None

    def _report_ended(self) -> None:
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            # Whoever started the program may have lost interest
            with self._running.pop(pid) as channel, contextlib.suppress(OSError):
                channel.send(str(os.waitstatus_to_exitcode(status)).encode())

    def _close(self) -> None:
        """In a program: let go of what belongs to the server."""
        signal.set_wakeup_fd(-1)
        for inherited in (self._control, self._awake, self._waker, *self._running.values()):
            inherited.close()


def import_everything() -> None:
    """Import the libraries and all modules of the trainer."""
    sys.path[0] = str(ROOT)
    for name in WARM_MODULES:
        importlib.import_module(name)
    for module in pkgutil.walk_packages([str(ROOT / "vit")], "vit."):
        # A broken module is for the program that needs it to report
        with contextlib.suppress(Exception):
            importlib.import_module(module.name)


def become(request: Request) -> None:
    """Give this fork what a new process has: streams, signals, folder, environment."""
    for number, stream in enumerate(request.streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request.content["new_session"]:
        os.setsid()
    os.chdir(request.content["cwd"])
    os.environ.clear()
    os.environ.update(request.content["environment"])
    # Python's own generator is seeded anew by a fork, NumPy's is not
    np.random.seed()  # noqa: NPY002
    sys.excepthook = show_error


def run(request: Request) -> None:
    """Run the script or the module as `python` would: this returns or raises as it does."""
    program = request.content["program"]
    sys.argv = [program, *request.content["arguments"]]
    is_script = program.endswith(".py")
    sys.path[0] = str(Path(program).parent) if is_script else os.getcwd()
    if not Path(sys.path[0]).is_relative_to(ROOT):
        forget_trainer()
    if is_script:
        runpy.run_path(program, run_name="__main__")
    else:
        sys.modules.pop(program, None)  # or Python warns that it is imported already
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def forget_trainer() -> None:
    """Let a program of another copy of the project import that copy's modules."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "vit":
            del sys.modules[name]


def exit_code(request: Request) -> int:
    """Run the program to its end; what Python would leave with (negative: by a signal)."""
    try:
        run(request)
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        print(leaving.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def show_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print a traceback that begins in the program, as Python itself would show it."""
    while trace is not None and is_ours(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    traceback.print_exception(kind, error, trace)


def is_ours(file: str) -> bool:
    return file == __file__ or "runpy" in file


def leave(code: int) -> NoReturn:
    """End as the interpreter ends: wait for threads, call what is registered, flush.

    Only the modules are not taken apart, which would take longer than many a program. So a file
    that a program leaves open in a global variable is not flushed.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        if not sys.stdout.closed:
            sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored in: {sys.stdout!r}", file=sys.stderr)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 120
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def main() -> None:
    import_everything()
    gc.freeze()  # a collection in a program would otherwise copy all that the programs share
    request = Server(socket.socket(fileno=int(sys.argv[1]))).serve()
    become(request)
    leave(exit_code(request))


if __name__ == "__main__":
    main()
