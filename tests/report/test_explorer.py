"""What the explorer's page holds: quantized attention, predictions without a head, its size."""

from pathlib import Path

import pytest
import torch
from limited_memory import memory_of

from vit.checkpoints.snapshots import Snapshot
from vit.data.preprocessing import Preprocessing
from vit.model.vision_transformer import VisionTransformer
from vit.report.explorer import (
    Example,
    build_page,
    bytes_per_image,
    logits_without_heads,
    quantize,
)
from vit.runtime.memory import MemoryLimit

TEMPLATE = '<script id="about">{about}</script>\n{blobs}\n'


def build(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    settings = {
        "image_size": (16, 24),
        "patch_size": 8,
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_classes": 3,
        "init": "trunc_normal",
        "init_range": 0.3,
    }
    model = VisionTransformer(**{**settings, **changes}).eval()
    model.classes = ["cat", "{blobs}</script>", "bird"]
    model.preprocessing = Preprocessing((16, 24), 3, (0.5,), (0.25,), None, "bilinear")
    return model


def page_of(model: VisionTransformer, num_images: int) -> str:
    snapshots = [Snapshot(Path("run/best.safetensors"), model, 100)]
    examples = [Example("a.png", torch.zeros(3, 16, 24), None)] * num_images
    return build_page(TEMPLATE, snapshots, examples, [0, 1, 2], torch.device("cpu"))


def dequantize(rows: torch.Tensor) -> torch.Tensor:
    squares = quantize(rows).double() ** 2
    return squares / squares.sum(dim=-1, keepdim=True)


def test_quantized_rows_are_near_and_sum_to_one():
    torch.manual_seed(0)
    rows = torch.cat([(torch.randn(50, 197) * spread).softmax(dim=1) for spread in (0, 1, 4, 12)])
    result = dequantize(rows)
    bound = (rows * rows.amax(dim=1, keepdim=True)).sqrt() / 255
    assert ((result - rows).abs() <= 1.5 * bound + 0.01 * rows + 1e-5).all()


def test_what_one_token_leaves_for_the_others_is_still_distinguished():
    row = torch.tensor([[0.98, 0.0003, 0.0007, 0.019]])
    torch.testing.assert_close(dequantize(row), row.double(), atol=1e-4, rtol=0.1)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_logits_without_heads_are_those_of_a_mask(layer):
    model = build(pruned_heads={1: [0, 2]})
    image = torch.randn(1, 3, 16, 24)
    with torch.no_grad():
        state = model.trace(image).hidden_states[layer]
        result = logits_without_heads(model, state, layer, MemoryLimit(torch.device("cpu")))
        heads = model.encoder.blocks[layer].attention.heads
        assert len(result) == len(heads)
        for logits, head in zip(result, heads, strict=True):
            mask = torch.ones(3, 4)
            mask[layer, head] = 0
            expected = model.trace(image, mask).logits[0]
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_heads_are_switched_off_in_parts_where_memory_ends():
    model = build()
    state = torch.randn(1, 1 + 2 * 3, 32)
    lines = []
    memory = MemoryLimit(torch.device("cpu"), lines.append)
    with torch.no_grad():
        expected = logits_without_heads(model, state, 1, memory)
        with memory_of(model.head, 3) as sizes:
            result = logits_without_heads(model, state, 1, memory)
    assert sizes == [4, 2, 2]
    assert len(lines) == 1
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)


def test_the_size_of_an_image_on_the_page_is_known_beforehand():
    model = build(num_registers=2, pruned_heads={1: [0, 2]})
    added = len(page_of(model, 2)) - len(page_of(model, 1))
    snapshots = [Snapshot(Path("best.safetensors"), model, 100)]
    names_and_tags = 300
    assert abs(added - bytes_per_image(snapshots, [0, 1, 2])) < names_and_tags


def test_names_of_classes_are_neither_markup_nor_placeholders():
    description = page_of(build(), 1).splitlines()[0]
    assert description.endswith("</script>")
    assert description.count("</script>") == 1
    assert "{blobs}" in description
