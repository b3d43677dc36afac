import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch import nn

from vit.evaluation.accuracy import evaluate, wilson_interval
from vit.runtime.compiling import compile_model, worth_compiling
from vit.runtime.precision import Precision, choose_precision

FP32 = Precision("fp32", torch.device("cpu"))


def test_metrics_are_scikit_learns_whatever_the_batches():
    logits, labels = (
        torch.randn(1003, 10, generator=torch.Generator().manual_seed(0)) * 2,
        torch.arange(1003) % 10,
    )
    for size in (1003, 100, 7):
        metrics = evaluate(
            nn.Identity(), zip(logits.split(size), labels.split(size), strict=True), FP32
        )
        assert metrics["n"] == 1003
        assert metrics["top1"] == accuracy_score(labels, logits.argmax(1))
        assert metrics["top5"] == top_k_accuracy_score(labels, logits, k=5)
        assert metrics["loss"] == pytest.approx(
            log_loss(labels, logits.softmax(1).double().numpy()), rel=1e-5
        )


def test_fewer_than_five_classes():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    assert evaluate(nn.Identity(), [(logits, torch.tensor([0, 0]))], FP32)["top5"] == 1.0


def test_dropout_is_off():
    model = nn.Dropout(0.9).train()
    logits = torch.eye(4)
    assert evaluate(model, [(logits, torch.arange(4))], FP32)["top1"] == 1.0


def test_wilsons_interval():
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    low, high = wilson_interval(1.0, 20)
    assert (low, high) == pytest.approx((0.8389, 1.0), abs=1e-4)


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
