"""What the explorer's page (vit/explore.html) holds: attention maps and predictions of some images.

The page loads nothing, so everything is computed here and stored in it: of every image in every
snapshot of the model, the attention of all heads, the rollout up to every layer, the probabilities,
and the probabilities with each head switched off by itself.

Sources: rollout, Abnar & Zuidema 2020 (arXiv:2005.00928), section 3; heads switched off one at a
time, Michel et al. 2019 (arXiv:1905.10650), section 3.2.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vit.checkpoints.snapshots import Snapshot
from vit.figures.attention import COLORMAP
from vit.model.attention_maps import rollout, shows_class_token
from vit.model.head_pruning import attention_modules, num_original_heads
from vit.model.vision_transformer import VisionTransformer
from vit.runtime.attention_kernels import exclude_faulty_attention
from vit.runtime.memory import MemoryLimit


@dataclass(frozen=True)
class Example:
    """An image to look at: the model's input, (C, height, width) on the CPU.

    label: the index of its true class, or None where that is not known.
    """

    name: str
    image: Tensor
    label: int | None


def build_page(
    template: str,
    snapshots: Sequence[Snapshot],
    examples: Sequence[Example],
    layers: Sequence[int],
    device: torch.device,
) -> str:
    """Fill the template: {about} with a JSON description, {blobs} with base64 in script elements.

    The elements, by their ids, where S is the index of a snapshot and I that of an image:

    picture-I     the image, RGB, uint8 (height, width, 3)
    maps-S-I      its attention maps, uint8 (M, N, N), as `examine` returns them
    chances-S-I   its probabilities, float32 (1 + heads, classes), as `examine` returns them
    """
    blobs = {}
    memory = MemoryLimit(device, items="heads switched off")
    for s, snapshot in enumerate(snapshots):
        model = snapshot.model.to(device)
        # The layers above a head that is switched off are computed by the fused kernels
        exclude_faulty_attention(device, model)
        for i, example in enumerate(examples):
            maps, probabilities = examine(model, example.image.to(device), layers, memory)
            blobs[f"maps-{s}-{i}"] = encode(maps)
            blobs[f"chances-{s}-{i}"] = encode(probabilities)
    for i, example in enumerate(examples):
        blobs[f"picture-{i}"] = encode(displayable_pixels(snapshots[0].model, example))
    elements = [
        f'<script type="text/plain" id="{name}">{text}</script>' for name, text in blobs.items()
    ]

    # A class may be called </script>
    description = json.dumps(describe(snapshots, examples, layers)).replace("<", "\\u003c")
    # In this order: the description holds names that users chose, one of which may be {blobs}
    page = template.replace("{blobs}", "\n".join(elements), 1)
    return page.replace("{about}", description, 1)


def describe(
    snapshots: Sequence[Snapshot], examples: Sequence[Example], layers: Sequence[int]
) -> dict[str, Any]:
    """What the page knows beside numbers; the keys are those that its script reads."""
    model = snapshots[0].model
    embeddings = model.embeddings
    attentions = attention_modules(model)
    return {
        "classes": model.classes,
        "pool": model.global_pool,
        "classToken": shows_class_token(model),
        "prefix": prefix_token_names(model),
        "layers": list(layers),
        "grid": list(embeddings.patch_embedding.grid_size),
        "size": list(embeddings.patch_embedding.image_size),
        "heads": num_original_heads(attentions[0]),
        "colours": COLORMAP.mul(255).round().int().tolist(),
        "width": embeddings.patch_embedding.projection.out_channels,
        "depth": len(attentions),
        "images": [{"name": example.name, "label": example.label} for example in examples],
        "snapshots": [describe_snapshot(snapshot, layers) for snapshot in snapshots],
    }


def describe_snapshot(snapshot: Snapshot, layers: Sequence[int]) -> dict[str, Any]:
    attentions = attention_modules(snapshot.model)
    return {
        "file": "/".join(snapshot.path.parts[-3:]),
        "step": snapshot.step,
        "heads": [attentions[layer].heads for layer in layers],
    }


def prefix_token_names(model: VisionTransformer) -> list[str]:
    """The names of the tokens before the patches."""
    embeddings = model.embeddings
    names = [] if embeddings.cls_token is None else ["class token"]
    if embeddings.distill_token is not None:
        names.append("distillation token")
    num_registers = embeddings.num_prefix - len(names)
    return [*names, *(f"register {number}" for number in range(num_registers))]


def displayable_pixels(model: VisionTransformer, example: Example) -> Tensor:
    """The image as the model sees it, RGB, uint8 (height, width, 3)."""
    image = model.preprocessing.denormalize(example.image[None])[0].expand(3, -1, -1)
    return image.mul(255).round().to(torch.uint8).permute(1, 2, 0)


def examine(
    model: VisionTransformer,
    image: Tensor,
    layers: Sequence[int],
    memory: MemoryLimit,
) -> tuple[Tensor, Tensor]:
    """Trace one image (C, height, width), on the device of a model in evaluation mode.

    Returns, on the CPU,

    - the maps, uint8 (M, N, N): for each of the layers its remaining heads, then the rollout up to
      it, all quantized; and
    - the probabilities, float32 (1 + heads, classes): of the whole model, then with each of these
      heads switched off by itself.
    """
    with torch.inference_mode():
        trace = model.trace(image[None])
        maps = []
        logits = [trace.logits]
        # The page counts on this order: heads, then the rollout, layer by layer
        for layer in layers:
            rolled_out = rollout(trace.attentions[: layer + 1])
            maps.append(quantize(torch.cat([trace.attentions[layer][0], rolled_out])))
            logits.append(logits_without_heads(model, trace.hidden_states[layer], layer, memory))
        return torch.cat(maps).cpu(), torch.cat(logits).softmax(dim=1).cpu()


def quantize(rows: Tensor) -> Tensor:
    """Quantize rows of attention (…, N), which sum to one, to uint8; the page shows q² / Σ q².

    The square roots are stored, relative to the row's largest: where one token takes nearly all of
    the attention (a class token, a register), linear steps would leave zeros for the others. An
    entry p of a row whose largest is m comes back within about √(p m) / 255, and the row sums to 1.
    """
    relative = rows / rows.amax(dim=-1, keepdim=True)
    return relative.sqrt().mul(255).round().to(torch.uint8)


def logits_without_heads(
    model: VisionTransformer, state: Tensor, layer: int, memory: MemoryLimit
) -> Tensor:
    """The logits (heads, classes) with each head of a layer switched off by itself.

    The same as `model.trace` with a head_mask for each, without computing the layers below again.

    state: of one image, (1, N, D), as it enters the layer. memory: how many heads are switched off
    at once.
    """
    block, *later_blocks = list(model.encoder.blocks)[layer:]
    attention = attention_modules(model)[layer]

    def logits_with(masks: Tensor) -> Tensor:
        states = state.expand(len(masks), -1, -1)
        states, _ = block.trace(states, model.encoder.rotation, masks)  # type: ignore[operator]
        for later_block in later_blocks:
            states = later_block(states, model.encoder.rotation)
        return model.classify(model.encoder.finish(states))

    # One row of the batch for each head that is left; masks go by the heads' original numbers
    all_masks = 1 - torch.eye(num_original_heads(attention), device=state.device)
    return torch.cat(list(memory.parts(logits_with, all_masks[attention.heads])))


def encode(tensor: Tensor) -> str:
    """The bytes of a tensor, in the order of its axes and little-endian, as base64."""
    array = tensor.contiguous().numpy()
    little_endian = array.astype(array.dtype.newbyteorder("<"))
    return base64.b64encode(little_endian.tobytes()).decode()


def bytes_per_image(snapshots: Sequence[Snapshot], layers: Sequence[int]) -> int:
    """How many bytes one image adds to the page."""
    model = snapshots[0].model
    patches = model.embeddings.patch_embedding
    height, width = patches.image_size
    num_tokens = model.embeddings.num_prefix + patches.num_patches
    num_heads = 0
    for snapshot in snapshots:
        attentions = attention_modules(snapshot.model)
        num_heads += sum(len(attentions[layer].heads) for layer in layers)

    num_maps = num_heads + len(snapshots) * len(layers)  # with a rollout for each layer
    num_predictions = num_heads + len(snapshots)  # with one of the whole model
    raw = num_maps * num_tokens**2 + num_predictions * 4 * len(model.classes) + 3 * height * width
    return raw * 4 // 3  # base64 writes three bytes as four characters
