"""What a model costs and what shapes it computes, known before anything is trained."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vit.model.conv_stem import ConvStem
from vit.model.pooling import AttentionPool, Pooler
from vit.model.resnet_stem import ResNetStem
from vit.model.vision_transformer import (
    Attention,
    Block,
    Embeddings,
    Encoder,
    PatchEmbedding,
    VisionTransformer,
)

# The kinds of modules whose output shapes are listed
LISTED = (
    ResNetStem,
    ConvStem,
    PatchEmbedding,
    Embeddings,
    Attention,
    Block,
    Encoder,
    AttentionPool,
    Pooler,
    nn.Linear,
)


class WholeSequence(nn.Module):
    """The model as the paper describes it: the last block computes all tokens.

    VisionTransformer.forward leaves out what the last block would compute for tokens that are not
    pooled; papers count them. (B, C, height, width) → (B, num_classes)
    """

    def __init__(self, model: VisionTransformer):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        sequence = model.encoder(model.embeddings(images))
        return model.classify(sequence)


def forward_on_meta(
    model: VisionTransformer, batch_size: int, *, whole: bool = True, training: bool = False
) -> Tensor:
    """Run one forward pass on shapes alone: nothing is computed or allocated.

    whole: as WholeSequence, else as forward; training: in training mode, which drops patches. The
    model keeps its weights and its mode. Returns the logits (batch_size, num_classes) on the meta
    device.
    """
    # Tensors on the meta device have a shape and a type, but no memory. functional_call uses them
    # in place of the weights for this one call, so the model itself is not touched.
    called = WholeSequence(model) if whole else model
    tensors = {**dict(called.named_parameters()), **dict(called.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    patches = model.embeddings.patch_embedding
    images = torch.empty(batch_size, patches.num_channels, *patches.image_size, device="meta")
    was_training = model.training
    model.train(training)
    with torch.no_grad():
        logits = torch.func.functional_call(called, shapes, (images,))
    model.train(was_training)
    return logits


def count_macs(model: VisionTransformer) -> int:
    """Multiply-adds of one image's forward pass, in its matrix products and convolutions.

    One multiply-add is two FLOPs; a training step takes three times as many. They are counted by
    torch's FLOP counter and over all tokens, as papers do (see WholeSequence). Norms, softmax and
    activations are left out; they add less than 2 %.
    """
    with FlopCounterMode(display=False) as counter:
        forward_on_meta(model, 1)
    # torch counts a multiplication and an addition as two.
    return counter.get_total_flops() // 2


def training_flops(model: VisionTransformer, head_only: bool = False) -> int:
    """FLOPs that one image costs in training: of the multiply-adds that are really done.

    6 a multiply-add, 2 forward and 4 backward; 2 where there is no backward pass. Dropped patches,
    and what the last block leaves out, are not counted; what activation checkpointing computes a
    second time is not either, since it brings training no further. head_only: no other layer is
    trained.
    """
    forward = forward_flops(model, training=True)
    # A multiply-add for each of the heads' weights
    heads = [head for head in (model.head, model.head_distill) if head is not None]
    head = 2 * sum(head.weight.numel() for head in heads)
    return forward + 2 * (head if head_only else forward)


def forward_flops(model: VisionTransformer, training: bool = False) -> int:
    """FLOPs of one image's forward pass: 2 for each multiply-add that is really done.

    training: in training mode, which drops patches.
    """
    with FlopCounterMode(display=False) as counter:
        forward_on_meta(model, 1, whole=False, training=training)
    return counter.get_total_flops()


def stage_shapes(model: VisionTransformer, batch_size: int) -> list[tuple[str, tuple[int, ...]]]:
    """List the output shapes of the model's parts in the order of one forward pass.

    Returns pairs of "name (class)" and the shape. Of the blocks only the first and the last are
    listed.
    """
    rows: list[tuple[str, tuple[int, ...]]] = []

    def record_as(label: str):
        def record(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            rows.append((label, tuple(output.shape)))

        return record

    # The blocks between the first and the last have the same shapes.
    last_block = len(model.encoder.blocks) - 1
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, LISTED) and block_number(name) in (None, 0, last_block):
            label = f"{name} ({type(module).__name__})"
            handles.append(module.register_forward_hook(record_as(label)))
    forward_on_meta(model, batch_size)
    for handle in handles:
        handle.remove()
    return rows


def block_number(name: str) -> int | None:
    """The number of the block that a module of this name belongs to, or None."""
    parts = name.split(".")
    if parts[:2] == ["encoder", "blocks"] and len(parts) > 2:
        return int(parts[2])
    return None
