"""Which kernels of fused attention torch may choose from on a GPU.

The choice is torch's own: it knows which are the fastest for a device and a shape. Excluded is only
what is known to be wrong. That holds for the whole process, not for a block of code, since
activation checkpointing computes forward passes again in the backward pass, outside any such block,
and has to get the same kernels there.
"""

import torch

from vit.model.positions import kept_patches
from vit.model.vision_transformer import VisionTransformer

# Versions of cuDNN as torch.backends.cudnn.version() gives them: 91501 is 9.15.1.
# Up to this one, results are wrong for lengths that 128 doesn't divide (pytorch/pytorch#169849)
LAST_WITH_WRONG_RESULTS = 91500
# Up to this one, gradients may be NaN for lengths of 64 more than a multiple of 128
# (pytorch/pytorch#196678), as 8 x 8 patches without a class token have
LAST_WITH_NAN_GRADIENTS = 92501


def exclude_faulty_attention(device: torch.device, model: VisionTransformer) -> None:
    """Keep torch from choosing cuDNN's attention, from now on, where it is wrong for this model."""
    # None: torch was built without cuDNN
    version = torch.backends.cudnn.version() if device.type == "cuda" else None
    lengths = attention_lengths(model)
    if version is not None and any(cudnn_is_faulty(version, length) for length in lengths):
        torch.backends.cuda.enable_cudnn_sdp(False)


def attention_lengths(model: VisionTransformer) -> set[int]:
    """How many tokens the model attends to, in evaluation and in training."""
    embeddings = model.embeddings
    num_patches = embeddings.patch_embedding.num_patches
    kept = kept_patches(num_patches, embeddings.patch_dropout)
    return {embeddings.num_prefix + count for count in (num_patches, kept)}


def cudnn_is_faulty(version: int, length: int) -> bool:
    """Whether attention by this version of cuDNN is known to be wrong for `length` tokens."""
    if version <= LAST_WITH_WRONG_RESULTS and length % 128 != 0:
        return True
    return version <= LAST_WITH_NAN_GRADIENTS and length % 128 == 64
