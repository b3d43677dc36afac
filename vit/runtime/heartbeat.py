"""A heartbeat between the processes of a run: one that falls silent ends it within half a minute.

A process that is suspended, or whose machine is gone, would otherwise be waited for until the
collectives' timeout, which is long because healthy processes may compile or save for minutes. The
heartbeat runs in a thread, so it continues meanwhile.
"""

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

BEAT_SECONDS = 2.0
MAX_SILENCE_SECONDS = 30.0
MAX_STOP_SECONDS = 5.0


class Heartbeat(threading.Thread):
    """Tells the other ranks that this one lives, and ends this process when one falls silent.

    store: where every rank writes its beats; names: host and process id of every other rank, by
    rank.
    """

    def __init__(self, rank: int, store: TCPStore, names: dict[int, str]):
        # A daemon, so that it can't keep a process alive whose main thread has failed
        super().__init__(daemon=True, name="heartbeat")
        self.rank, self.store, self.names = rank, store, names
        self.last_beat = dict.fromkeys(names, b"")
        self.last_look = time.monotonic()
        self.last_change = dict.fromkeys(names, self.last_look)
        self.stopped = threading.Event()
        # Rank 0 hosts the store, which lives as long as this reference
        self.server: TCPStore | None = None

    def run(self) -> None:
        """Exchange beats until stop() is called; the body of the thread."""
        beat = 0
        while not self.stopped.wait(BEAT_SECONDS):
            beat += 1
            began = time.monotonic()
            try:
                silent = self.exchange(beat)
            except (RuntimeError, OSError):
                # The store is gone, and with it rank 0, which hosts it. It may be in the middle of
                # ending, with its own exit code, after which the launcher ends this process
                silent = 0
                self.stopped.wait(max(0.0, began + MAX_SILENCE_SECONDS - time.monotonic()))
            # Looked at once more: a rank that has left in good order is no longer missed
            if silent is not None and not self.stopped.is_set():
                exit_after_silence(self.rank, silent, self.names.get(silent, ""))

    def exchange(self, beat: int) -> int | None:
        """Write this rank's beat and read the others'.

        Returns the rank that has been silent for too long, or None. Raises RuntimeError or OSError
        where the store does not answer.
        """
        self.store.set(f"beat {self.rank}", str(beat))

        # What kept this process from looking, such as a scheduler that suspends jobs, may have kept
        # the others from beating: they have time again from now on
        before, self.last_look = self.last_look, time.monotonic()
        if self.last_look - before > MAX_SILENCE_SECONDS / 2:
            self.last_change = dict.fromkeys(self.names, self.last_look)

        for other in self.names:
            key = f"beat {other}"
            # get() waits for a key that is not there yet
            value = self.store.get(key) if self.store.check([key]) else b""
            # By this process's clock alone: the clocks of two machines differ
            now = time.monotonic()
            if value != self.last_beat[other]:
                self.last_beat[other] = value
                self.last_change[other] = now
            elif now - self.last_change[other] > MAX_SILENCE_SECONDS:
                return other
        return None

    def stop(self) -> None:
        """End the thread and wait for that, up to MAX_STOP_SECONDS where the store is not there."""
        self.stopped.set()
        self.join(MAX_STOP_SECONDS)


def start_heartbeat(
    rank: int, count: int, broadcast: Callable[[Any], Any], barrier: Callable[[], None]
) -> Heartbeat:
    """Start the heartbeat of this rank; all ranks must call this together.

    broadcast: gives rank 0's value to all; barrier: waits for all.
    """
    # Rank 0 hosts a store for the heartbeat alone; port 0 is any free one
    host = os.environ["MASTER_ADDR"]
    server = None
    if rank == 0:
        server = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    port = broadcast(server.port if server else None)

    # Rank 0 connects as a client too, so that the thread and the server's shutdown share nothing
    timeout = timedelta(seconds=MAX_SILENCE_SECONDS)
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)

    # All names are written before any is read
    store.set(f"name {rank}", f"{socket.gethostname()} {os.getpid()}")
    barrier()
    names = {other: store.get(f"name {other}").decode() for other in range(count) if other != rank}

    heartbeat = Heartbeat(rank, store, names)
    heartbeat.server = server
    heartbeat.start()

    # However this process ends: a thread that comes back from torch's C++ into an interpreter that
    # is being torn down aborts the process
    atexit.register(heartbeat.stop)
    return heartbeat


def exit_after_silence(rank: int, silent: int, name: str) -> None:
    """End this process because another rank is silent, and that one if it is on this machine.

    name: its host and process id. The exit code is 3, as of other runs that failed.
    """
    host, _, process = name.partition(" ")
    message = (
        f"rank {rank}: no sign of life from rank {silent} (process {process} on {host}); "
        "exiting. The last checkpoint is kept"
    )
    print(message, file=sys.stderr, flush=True)

    # A suspended process would lie in memory forever; SIGKILL reaches it all the same
    if host == socket.gethostname():
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(process), signal.SIGKILL)

    # From a thread sys.exit would end only the thread, while the main one waits in a collective
    os._exit(3)
