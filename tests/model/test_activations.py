"""The activation functions of the MLP."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from vit.model.activations import ACTIVATIONS, build_activation

REFERENCES = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": ACT2FN["quick_gelu"],
    "relu": F.relu,
    "relu2": ACT2FN["relu2"],
    "silu": F.silu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_torch_and_hugging_face(name):
    x = torch.randn(4, 8)
    torch.testing.assert_close(build_activation(name)(x), REFERENCES[name](x))


def test_another_name_is_refused():
    with pytest.raises(ValueError, match=r"activation must be one of gelu, .*, got tanh"):
        build_activation("tanh")
