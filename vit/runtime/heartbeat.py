"""TODO: say what this file is for."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vit.runtime.processes import Processes

BEAT_SECONDS, MAX_SILENCE_SECONDS = (
    2.0,
    30.0,
)  # a process that has not been heard of for so long ends the run


def start_heartbeat(group: "Processes") -> None:
    """Start a thread in which every process says that it lives, and ends the run when another falls silent: one that is
    stopped or whose machine is gone would otherwise be waited for until the collectives' timeout. A process that compiles or
    saves goes on saying so, since this is a thread of its own."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    host = os.environ["MASTER_ADDR"]
    server = TCPStore(host, 0, is_master=True, wait_for_workers=False) if group.rank == 0 else None
    port = group.from_first(server.port if server else None)
    # The server's own process connects as a client too, so that a thread and its shutdown share nothing
    store = TCPStore(
        host,
        port,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=MAX_SILENCE_SECONDS),
    )
    store.set(f"name {group.rank}", f"{socket.gethostname()} {os.getpid()}")
    group.any(True)
    names = {
        other: store.get(f"name {other}").decode()
        for other in range(group.count)
        if other != group.rank
    }

    def watch() -> None:
        seen: dict[int, tuple[bytes, float]] = {other: (b"", time.monotonic()) for other in names}
        beat = 0
        while not group.parted.wait(BEAT_SECONDS):
            beat += 1
            silent = None
            try:
                store.set(f"beat {group.rank}", str(beat))
                for other, (before, since) in seen.items():
                    key = f"beat {other}"
                    told = store.get(key) if store.check([key]) else b""
                    if told != before:
                        seen[other] = (told, time.monotonic())
                    elif time.monotonic() - since > MAX_SILENCE_SECONDS:
                        silent = other
            except (RuntimeError, OSError):  # rank 0 keeps the store
                silent = 0
            if silent is not None and not group.parted.is_set():
                exit_after_silence(group.rank, silent, names.get(silent, ""))

    group.held = server
    threading.Thread(target=watch, daemon=True, name="watch").start()


def exit_after_silence(own: int, silent: int, name: str) -> None:
    """End this process because another has ended or fallen silent, and that one too where it is on this machine."""
    host, _, process = name.partition(" ")
    print(
        f"rank {own}: nothing is heard of rank {silent} any more (process {process} on {host}); ending. The last checkpoint "
        "is kept",
        file=sys.stderr,
        flush=True,
    )
    if host == socket.gethostname():
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(process), signal.SIGKILL)
    os._exit(3)
