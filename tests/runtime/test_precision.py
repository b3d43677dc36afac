"""What train.precision=auto chooses, and what a precision does."""

import pytest
import torch
from torch import nn

from vit.model.vision_transformer import VisionTransformer
from vit.runtime.precision import Precision, choose_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("has_bf16", "width", "name"),
    [
        (True, 128, "fp32"),
        (True, 192, "bf16"),
        (True, 768, "bf16"),
        (False, 768, "fp32"),
    ],
)
def test_auto_on_the_cpu(monkeypatch, has_bf16, width, name):
    monkeypatch.setattr("vit.runtime.precision.cpu_multiplies_bf16", lambda: has_bf16)
    assert choose_precision("auto", CPU, width).name == name


@pytest.mark.parametrize(
    ("capability", "name"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_auto_on_a_gpu(monkeypatch, capability, name):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert choose_precision("auto", CUDA, 64).name == name


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_what_is_asked_for_is_taken(monkeypatch, name):
    monkeypatch.setattr("vit.runtime.precision.cpu_multiplies_bf16", lambda: False)
    assert choose_precision(name, CPU, 768).name == name


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_products_are_of_the_precision_and_weights_stay_float32(name, dtype):
    layer = nn.Linear(2, 2)
    precision = Precision(name, CPU)
    with precision.autocast():
        assert layer(torch.ones(1, 2)).dtype == dtype
    assert precision.dtype == dtype
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"position": "learned"}, torch.float32),
        ({"position": "rope2d"}, torch.bfloat16),
        ({"position": "rope2d", "layer_scale": 0.1}, torch.float32),
    ],
)
def test_what_flows_between_the_blocks(changes, dtype):
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    model = VisionTransformer(num_classes=2, **sizes, **changes)
    with Precision("bf16", CPU).autocast():
        trace = model.trace(torch.zeros(1, 3, 8, 8))
    assert trace.hidden_states[1].dtype == dtype


def test_only_fp16_scales_its_loss():
    enabled = {
        name: Precision(name, CPU).scaler().is_enabled() for name in ("fp32", "bf16", "fp16")
    }
    assert enabled == {"fp32": False, "bf16": False, "fp16": True}
