"""What a model costs and what shapes it computes, known before anything is trained."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence

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
    model: VisionTransformer,
    batch_size: int,
    *,
    whole: bool = True,
    training: bool = False,
    frozen: Sequence[nn.Module] = (),
) -> Tensor:
    """Run one forward pass on shapes alone: nothing is computed or allocated.

    whole: as WholeSequence, else as forward; training: in training mode, which drops patches, but
    for the frozen modules. The model keeps its weights and its mode. Returns the logits
    (batch_size, num_classes) on the meta device.
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
    for module in frozen:
        module.eval()
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


def training_flops(model: VisionTransformer, frozen: Sequence[nn.Module] = ()) -> int:
    """FLOPs that one image costs in training: of the multiply-adds that are really done.

    6 a multiply-add, 2 forward and 4 backward, half of these for the gradient of each factor; 2
    before the first trained part, which has no backward pass; 4 where a weight behind it is frozen.
    Dropped patches, and what the last block leaves out, are not counted; what activation
    checkpointing computes a second time is not either, since it brings training no further.
    frozen: the modules that compute as in evaluation.
    """
    fixed_parts = parts_without_gradients(model)
    with FlopCounterMode(display=False) as counter, products_of_frozen(model, fixed_parts) as later:
        forward_on_meta(model, 1, whole=False, training=True, frozen=frozen)
    forward = counter.get_total_flops()

    # Counted by the modules' names; one that is never called has none
    counts = counter.get_flop_counts()
    names = {module: name for name, module in model.named_modules()}
    keys = [f"{type(model).__name__}.{names[module]}" for module in fixed_parts]
    fixed = sum(sum(counts[key].values()) for key in keys if key in counts)
    return forward + 2 * (forward - fixed) - sum(later)


def parts_without_gradients(model: VisionTransformer) -> list[nn.Module]:
    """Return the model's first parts, up to the first of which something is trained."""
    after = (model.encoder.norm, model.attention_pool, model.pooler)
    before = [model.embeddings, *model.encoder.blocks.children()]
    parts = [*before, *(part for part in after if part is not None)]
    return list(itertools.takewhile(lambda part: not is_trained(part), parts))


def is_trained(module: nn.Module) -> bool:
    """Whether any parameter of a module gets gradients."""
    return any(item.requires_grad for item in module.parameters())


@contextlib.contextmanager
def products_of_frozen(
    model: VisionTransformer, fixed_parts: Sequence[nn.Module]
) -> Iterator[list[int]]:
    """List the forward FLOPs of every product with a frozen weight, fixed parts left out.

    Each is counted when it is computed, within the block.
    """
    flops: list[int] = []
    fixed = {module for part in fixed_parts for module in part.modules()}
    layers = [item for item in model.modules() if isinstance(item, nn.Linear) and item not in fixed]
    # Now, since the pass puts other tensors in the place of the parameters
    sizes: dict[nn.Module, int] = {
        layer: layer.weight.numel() for layer in layers if not layer.weight.requires_grad
    }

    def count(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        multiplied: list[nn.Module] = [module]
        # The attention multiplies by three matrices as one, without calling them
        if isinstance(module, Attention):
            multiplied = [module.query, module.key, module.value]
        rows = inputs[0].numel() // inputs[0].shape[-1]
        flops.extend(2 * rows * sizes[layer] for layer in multiplied if layer in sizes)

    attentions = [item for item in model.modules() if isinstance(item, Attention)]
    handles = [item.register_forward_hook(count) for item in (*layers, *attentions)]
    yield flops
    for handle in handles:
        handle.remove()


def forward_flops(model: VisionTransformer) -> int:
    """FLOPs of one image's forward pass: 2 for each multiply-add that is really done."""
    with FlopCounterMode(display=False) as counter:
        forward_on_meta(model, 1, whole=False)
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
