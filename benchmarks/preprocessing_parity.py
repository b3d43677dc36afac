"""Do we see pictures as the libraries do whose weights we load? Pixels of every picture in a folder, prepared by each
library's own transform and by ours, as vit.weights reads it from that library's files.

    python benchmarks/preprocessing_parity.py ../shared/data/imagenet-jpegs

Differences are in steps of an 8-bit pixel (1 = one of 256 grey levels), so that mean and std don't matter.
Needs timm and transformers.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

from vit.data.image_files import EXTENSIONS
from vit.data.preprocessing import Preprocessing
from vit.weights.loading import read

Transform = Callable[[Image.Image], Tensor]
PROCESSORS = {
    "squash 224, bilinear": {"size": {"height": 224, "width": 224}, "resample": 2},
    "crop 224 of 256, bicubic": {
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    },
}


def from_timm(
    folder: Path, architecture: str, overlay: dict
) -> tuple[Transform, Preprocessing | None]:
    model = timm.create_model(architecture, depth=1, pretrained_cfg_overlay=overlay)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return create_transform(**resolve_data_config({}, model=model)), read(folder).preprocessing


def from_torchvision(
    folder: Path, name: str, weights: str
) -> tuple[Transform, Preprocessing | None]:
    published = torchvision.models.get_model_weights(name)[weights]
    width, patch = {
        "vit_b_16": (768, 16),
        "vit_b_32": (768, 32),
        "vit_l_16": (1024, 16),
        "vit_l_32": (1024, 32),
        "vit_h_14": (1280, 14),
    }[name]
    size = published.meta["min_size"][0]
    theirs = torchvision.models.VisionTransformer(size, patch, 1, 16, width, 64)
    folder.mkdir()
    torch.save(theirs.state_dict(), folder / "weights.pth")
    return published.transforms(), read(folder / "weights.pth").preprocessing


def from_hugging_face(
    folder: Path, config: dict, backend: str
) -> tuple[Transform, Preprocessing | None]:
    model = ViTForImageClassification(ViTConfig(num_hidden_layers=1, image_size=224))
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", **config})
    )
    processor = AutoImageProcessor.from_pretrained(folder, backend=backend)
    return lambda picture: processor(picture, return_tensors="pt").pixel_values[0], read(
        folder
    ).preprocessing


def cases(root: Path):
    """(name, their transform, ours)."""
    for architecture, overlay in (
        ("vit_base_patch16_224", {}),
        ("vit_base_patch16_384", {}),
        ("deit3_small_patch16_224", {}),
        ("vit_base_patch16_224", {"crop_pct": 0.875, "interpolation": "bilinear"}),
        ("vit_base_patch16_224", {"crop_mode": "squash", "crop_pct": 1.0}),
    ):
        named = ", ".join(f"{key} {value}" for key, value in overlay.items())
        yield (
            f"timm {architecture}{' ' if named else ''}{named}",
            *from_timm(root / f"timm {architecture} {named}", architecture, overlay),
        )
    for name, weights in (
        ("vit_b_16", "IMAGENET1K_V1"),
        ("vit_b_32", "IMAGENET1K_V1"),
        ("vit_l_16", "IMAGENET1K_V1"),
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"),
        ("vit_l_16", "IMAGENET1K_SWAG_E2E_V1"),
        ("vit_h_14", "IMAGENET1K_SWAG_E2E_V1"),
    ):
        yield (
            f"torchvision {name} {weights}",
            *from_torchvision(root / f"{name} {weights}", name, weights),
        )
    for backend in ("pil", "torchvision"):
        for named, config in PROCESSORS.items():
            yield (
                f"Hugging Face {backend}, {named}",
                *from_hugging_face(root / f"{backend} {named}", config, backend),
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    pictures = sorted(path for path in given.folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    print(f"{len(pictures)} pictures in {given.folder}; differences in 8-bit steps\n")
    print(
        "| their transform | ours | max | mean | pictures that differ by 0.01 or more |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as root:
        for name, theirs, ours in cases(Path(root)):
            if ours is None:
                print(f"| {name} | not told by the files | | | |")
                continue
            std = torch.tensor(ours.std).reshape(-1, 1, 1) * 255
            differences = []
            for path in pictures:
                with Image.open(path) as picture:
                    picture = picture.convert("RGB")
                    differences.append((theirs(picture) - ours(picture)).abs() * std)
            worst = torch.stack([difference.max() for difference in differences])
            mean = torch.stack([difference.mean() for difference in differences]).mean()
            crop = "squash" if ours.eval_crop is None else f"crop {ours.eval_crop:.4g}"
            print(
                f"| {name} | {ours.image_size[0]}, {crop}, {ours.interpolation} | {worst.max():.4f} | {mean:.4f} | "
                f"{int((worst >= 0.01).sum())} |"
            )


if __name__ == "__main__":
    main()
