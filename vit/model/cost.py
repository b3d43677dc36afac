"""What a model costs and what shape everything has, before anything is trained."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vit.model.resnet_stem import ResNetStem
from vit.model.vision_transformer import (
    Attention,
    Block,
    Embeddings,
    Encoder,
    PatchEmbedding,
    Pooler,
    VisionTransformer,
)

SHOWN = (ResNetStem, PatchEmbedding, Embeddings, Attention, Block, Encoder, Pooler, nn.Linear)


class WholeSequence(nn.Module):
    """The model as the paper has it: forward() leaves out what the last block computes for tokens that nobody looks at."""

    def __init__(self, model: VisionTransformer):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        return model.head(model.pooler(model.pool(model.encoder(model.embeddings(images)))))


def forward_on_meta(model: VisionTransformer, batch_size: int) -> Tensor:
    """The logits of a batch of images that has only a shape: nothing is computed or held."""
    whole = WholeSequence(model)
    tensors = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    patches = model.embeddings.patch_embedding
    images = torch.empty(batch_size, patches.num_channels, *patches.image_size, device="meta")
    with torch.no_grad():
        return torch.func.functional_call(whole, shapes, (images,))


def count_macs(model: VisionTransformer) -> int:
    """Multiply-adds of one image's forward pass in its matrix products and convolutions, as torch counts them (two FLOPs
    each; training takes thrice as many) and as papers tell them: of all tokens, see WholeSequence. Norms, softmax and
    activations, under 2 %, are left out."""
    training = model.training
    with FlopCounterMode(display=False) as counter:
        forward_on_meta(model.eval(), 1)
    model.train(training)
    return counter.get_total_flops() // 2


def stage_shapes(model: VisionTransformer, batch_size: int) -> list[tuple[str, tuple[int, ...]]]:
    """(name and kind of the part, shape of its output) in the order of one pass; of the blocks only the first and the last."""
    last, rows, handles = len(model.encoder.blocks) - 1, [], []
    for name, module in model.named_modules():
        parts = name.split(".")
        if not isinstance(module, SHOWN) or (
            parts[:2] == ["encoder", "blocks"] and int(parts[2]) not in (0, last)
        ):
            continue

        def record(module: nn.Module, inputs: tuple, output: Tensor, name: str = name) -> None:
            rows.append((f"{name} ({type(module).__name__})", tuple(output.shape)))

        handles.append(module.register_forward_hook(record))
    training = model.training
    forward_on_meta(model.eval(), batch_size)
    model.train(training)
    for handle in handles:
        handle.remove()
    return rows


def training_memory(
    model: VisionTransformer, batch_size: int, bytes_per_activation: int, averaged: bool
) -> dict[str, int]:
    """An estimate of the bytes that training holds, by purpose.

    Weights, gradients, Adam's two moments and the average are float32. Of every block the backward pass needs the float32
    residual stream twice and both norms' outputs, and in the training precision q, k, v, the context, two branch outputs and
    the MLP's hidden layer before and after its activation: 16 D bytes and (6 D + 2 M) activations a token, M the MLP's width
    (fused attention keeps no N × N matrix). A ResNet before the patches is not counted.
    """
    weights = 4 * model.num_parameters()
    embeddings, blocks = model.embeddings, model.encoder.blocks
    first = blocks[0]
    assert isinstance(first, Block)
    tokens = embeddings.patch_embedding.num_patches + embeddings.num_prefix
    width, hidden = model.encoder.norm.normalized_shape[0], first.mlp.fc1.out_features
    per_token = 16 * width + (6 * width + 2 * hidden) * bytes_per_activation
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer (two moments)": 2 * weights,
        "average": weights if averaged else 0,
        "activations": batch_size * tokens * len(blocks) * per_token,
    }
