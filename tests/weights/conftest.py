"""What the tests of weights share."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small models are faster by one thread, tenfold where other processes share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
