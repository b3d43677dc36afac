"""A model at another resolution than it was trained at: more or fewer patches of the same size."""

from dataclasses import replace
from typing import Any

from torch import nn

from vit.checkpoints.model import build_model, load_weights
from vit.errors import ConfigError
from vit.model.positions import resize_positions
from vit.model.vision_transformer import VisionTransformer

POSITIONS = "embeddings.position_embedding"


def with_changed_input(
    model: VisionTransformer, settings: dict[str, Any], changes: dict[str, Any]
) -> VisionTransformer:
    """A restored model with another image size or crop, where `changes` has their keys.

    settings: the group `model` of its checkpoint. Raises ConfigError where the patches do not tile
    the images.
    """
    crop = model.preprocessing.eval_crop
    if "data.eval_crop" in changes:
        crop = changes["data.eval_crop"]
        model.preprocessing = replace(model.preprocessing, eval_crop=crop)
    if changes.get("model.image_size") is None:
        return model
    return at_image_size(model, settings, changes["model.image_size"])


def at_image_size(
    model: VisionTransformer, settings: dict[str, Any], image_size: Any
) -> VisionTransformer:
    """The same model for images of another size, in pixels: one number or (height, width).

    Learned positions are resized to the new grid of patches (bicubic, antialiased); fixed ones and
    rotations are computed for it. Raises ConfigError where the patches do not tile the images.
    """
    patches = model.embeddings.patch_embedding
    # A grid_size would change the patches, whose weights are for patches of their own size
    patch_size = list(patches.patch_size)
    size = list(image_size) if not isinstance(image_size, int | str) else image_size
    sizes = {"image_size": size, "patch_size": patch_size, "grid_size": None}
    unused = ("init", "init_range")
    settings = {key: value for key, value in settings.items() if key not in unused} | sizes
    try:
        resized = build_model(settings, model.head.out_features)
    except ValueError as error:
        raise ConfigError(f"model.image_size={image_size}: {error}") from None

    tensors = model.state_dict()
    if isinstance(model.embeddings.position_embedding, nn.Parameter):
        new_grid = resized.embeddings.patch_embedding.grid_size
        tensors[POSITIONS] = resize_positions(tensors[POSITIONS], patches.grid_size, new_grid)
    load_weights(resized, tensors, "model.image_size")
    resized.classes = model.classes
    resized.preprocessing = replace(
        model.preprocessing, image_size=resized.embeddings.patch_embedding.image_size
    )
    return resized.eval()
