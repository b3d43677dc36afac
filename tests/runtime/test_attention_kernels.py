"""Fused attention is torch's choice, without what is known to be wrong."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vit.model.vision_transformer import VisionTransformer
from vit.runtime.attention_kernels import (
    attention_lengths,
    cudnn_is_faulty,
    exclude_faulty_attention,
)
from vit.runtime.precision import Precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _torchs_setting():
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(allowed)


def make_model(**settings):
    sizes = {"image_size": 32, "patch_size": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 1}
    with torch.device("meta"):
        return VisionTransformer(num_classes=2, **{**sizes, **settings})


MEAN = {"cls_token": False, "global_pool": "mean"}
B16 = {"image_size": 224, "patch_size": 16}


@pytest.mark.parametrize(
    ("version", "settings", "allowed"),
    [
        # Up to 9.15.0 every length but the multiples of 128 is wrong
        (91002, {}, False),
        (91500, B16, False),
        (91500, {**MEAN, "image_size": 64}, True),
        # Then those of 64 more than a multiple, until 9.26
        (91501, {}, True),
        (91501, B16, True),
        (91501, MEAN, False),
        (92501, MEAN, False),
        (92501, {**MEAN, "image_size": 64}, True),
        (92600, MEAN, True),
        # The patches that are left in training count too
        (92400, {**MEAN, "image_size": 64, "patch_dropout": 0.25}, False),
        (None, MEAN, True),
    ],
)
def test_cudnn_is_excluded_where_it_is_wrong(monkeypatch, version, settings, allowed):
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: version)
    model = make_model(**settings)
    exclude_faulty_attention(CPU, model)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    exclude_faulty_attention(CUDA, model)
    assert torch.backends.cuda.cudnn_sdp_enabled() == allowed


def test_the_lengths_are_those_of_training_and_evaluation():
    assert attention_lengths(make_model()) == {65}
    assert attention_lengths(make_model(num_registers=3, patch_dropout=0.5)) == {68, 36}
    assert not cudnn_is_faulty(92400, 65)


class NotedKernels(nn.Module):
    """Notes in every forward pass which kernels of attention torch may choose from."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.seen = []

    def forward(self, x):
        allowed = torch.backends.cuda.cudnn_sdp_enabled()
        self.seen.append((allowed, torch._C._get_sdp_priority_order()))
        return self.linear(x)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_recomputing_in_the_backward_pass_chooses_from_the_same_kernels(monkeypatch, name):
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 91500)
    order = torch._C._get_sdp_priority_order()
    exclude_faulty_attention(CUDA, make_model())
    noted = NotedKernels()
    with Precision(name, CPU).autocast():
        loss = checkpoint(noted, torch.ones(1, 2), use_reentrant=False).sum()
    # Outside of the block, as training does it
    loss.backward()
    assert noted.seen == [(False, order)] * 2
