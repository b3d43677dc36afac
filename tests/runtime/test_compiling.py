"""Whether the model is compiled, and what is said where it can't be."""

import pytest
import torch
from torch import nn

from vit.runtime.compiling import compile_model, missing_compiler, worth_compiling
from vit.runtime.precision import Precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP32 = Precision("bf16", CPU), Precision("fp32", CPU)


@pytest.mark.parametrize(
    ("precision", "width", "run_flops", "worth"),
    [
        (BF16, 384, 1e16, True),
        (BF16, 192, 1e16, False),
        (BF16, 384, 1e13, False),
        (FP32, 768, 1e20, False),
        (Precision("bf16", CUDA), 192, 1e17, True),
        (Precision("fp32", CUDA), 192, 1e17, True),
        (Precision("bf16", CUDA), 192, 1e13, False),
        (Precision("fp32", torch.device("mps")), 768, 1e20, False),
    ],
)
def test_auto_decides_by_device_precision_width_and_length(precision, width, run_flops, worth):
    assert worth_compiling(precision, width, run_flops) == worth


def test_the_model_is_compiled_where_that_is_asked_for_or_pays():
    model = nn.Linear(2, 2)
    assert compile_model(model, "auto", BF16, 128, 1e16) == (model, None)
    assert compile_model(model, False, BF16, 768, 1e20) == (model, None)
    assert compile_model(model, True, FP32, 2, 1.0)[0] is not model
    assert compile_model(model, "auto", BF16, 384, 1e16)[0] is not model


def test_without_a_compiler_the_model_runs_uncompiled_and_says_so(monkeypatch):
    model = nn.Linear(2, 2)
    monkeypatch.setattr("vit.runtime.compiling.shutil.which", lambda name: None)
    monkeypatch.setattr("vit.runtime.compiling.has_triton", lambda: False)
    compiled, message = compile_model(model, True, FP32, 768, 1e20)
    assert compiled is model
    assert message.startswith("runtime.compile: ")
    assert "C++" in missing_compiler(CPU)
    assert "Triton" in missing_compiler(CUDA)
