"""Fixtures that the tests share."""

import logging
from pathlib import Path

import pytest
from helpers import DIGITS, train


def pytest_collection_modifyitems(items):
    """Start with the slow tests, so that none of them is the last one, alone on one core.

    Each of two workers begins with half of the list, and takes from the end of the other's when it
    is done with its own: so each half begins with every second of the slow tests.
    """
    slow = [item for item in items if item.get_closest_marker("slow") is not None]
    fast = [item for item in items if item.get_closest_marker("slow") is None]
    first = slow[::2]
    middle = max(0, len(items) // 2 - len(first))
    items[:] = [*first, *fast[:middle], *slow[1::2], *fast[middle:]]


@pytest.fixture(autouse=True)
def clean_log():
    """Remove the handlers that a run within a test's own process leaves at the logger."""
    yield
    log = logging.getLogger("vit")
    for handler in log.handlers:
        handler.close()
    log.handlers, log.propagate, log.disabled = [], False, False


@pytest.fixture
def log_lines():
    """The lines that the program logs, as they come."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("vit")
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)
    log.setLevel(level)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of one short run on digits, for all tests that only look at it."""
    folder = tmp_path_factory.mktemp("digits")
    done = train(folder, *DIGITS, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout
