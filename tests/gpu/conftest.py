"""Tests that need a GPU, each beside the CPU: they are skipped where there is none.

python -m pytest tests/gpu
VIT_TEST_DEVICE=cpu python -m pytest tests/gpu    # tries the tests themselves on any machine
"""

import os

import pytest
import torch

# For deterministic kernels: torch looks at it once, at the first matrix product of the process,
# which is one of a test that needs none
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def device() -> torch.device:
    """The GPU, or what VIT_TEST_DEVICE names in its place."""
    name = os.environ.get("VIT_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device(name)


@pytest.fixture
def gpu(device) -> torch.device:
    """A GPU for what no CPU has: memory of its own, streams, waits of the host."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    return device


@pytest.fixture(autouse=True)
def _torchs_settings():
    """Deterministic kernels and the format of float32 are settings of the whole process."""
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    torch.use_deterministic_algorithms(False)
