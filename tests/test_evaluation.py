"""How a run is computed: precision and compiling."""

import torch
from torch import nn

from vit.runtime.compiling import compile_model, worth_compiling
from vit.runtime.precision import choose_precision


def test_precision_auto_on_the_cpu(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr("vit.runtime.precision.cpu_multiplies_bf16", lambda: True)
    assert [choose_precision("auto", cpu, width).name for width in (128, 192, 768)] == [
        "fp32",
        "bf16",
        "bf16",
    ]
    monkeypatch.setattr("vit.runtime.precision.cpu_multiplies_bf16", lambda: False)
    assert choose_precision("auto", cpu, 768).name == "fp32"
    assert choose_precision("fp16", cpu, 768).name == "fp16"
    with choose_precision("bf16", cpu, 8).autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16


def test_compiling_is_chosen_by_device_width_and_length():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert worth_compiling(cpu, 384, 1e16)
    assert not worth_compiling(cpu, 192, 1e16)
    assert not worth_compiling(cpu, 384, 1e13)
    assert worth_compiling(cuda, 192, 1e17)
    assert not worth_compiling(cuda, 192, 1e13)
    model = nn.Linear(2, 2)
    assert compile_model(model, "auto", cpu, 128, 1e16) == (model, None)
    assert compile_model(model, False, cpu, 768, 1e20) == (model, None)
    assert compile_model(model, True, cpu, 2, 1.0)[0] is not model
