"""A function of many items, worked out by several processes. Imports no torch."""

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from vit.errors import ConfigError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4  # items a process that may wait for it, or for the use of their results


def map_in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """function(item) of every item, in order; by several processes where workers is more than 1.

    Items are taken as results are used, so that these do not pile up in memory where they are
    written more slowly than worked out. Raises ConfigError where a process was killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    # A forked process would lack the threads, but not the locks, that torch started in this one
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=init_process) as pool:
        waiting: collections.deque[Future[Result]] = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) == AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise ConfigError(
                "--workers: a process was killed, as systems do where the memory is used up; start "
                "again with fewer"
            ) from None
        finally:
            # Where results are no longer wanted, what waits need not be worked out
            pool.shutdown(cancel_futures=True)


def init_process() -> None:
    """Leave Ctrl+C to the parent, and end when it has ended, also where it was killed.

    Else this process would wait for work for ever: it holds both ends of the pipe it reads from.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
