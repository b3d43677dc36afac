"""Whether evaluation sees images as the libraries do whose weights we load.

    python benchmarks/preprocessing_parity.py FOLDER_OF_JPEGS

Every image of a folder is prepared by each library's own transform, and by ours, as vit.weights
reads it from that library's files. Differences are in steps of an 8-bit pixel (1 is one of 256
levels), so that mean and std do not matter. Needs timm and transformers.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

# The script is started by its path, and the repository is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.reporting import table_header, table_row
from vit.data.image_files import find_image_files
from vit.data.preprocessing import Preprocessing
from vit.errors import DataError
from vit.weights.loading import read

# A PIL image → float32 (C, height, width), normalized
Transform = Callable[[Image.Image], Tensor]

# (architecture, what differs from its own configuration)
TIMM_MODELS: list[tuple[str, dict[str, Any]]] = [
    ("vit_base_patch16_224", {}),
    ("vit_base_patch16_384", {}),
    ("deit3_small_patch16_224", {}),
    ("vit_base_patch16_224", {"crop_pct": 0.875, "interpolation": "bilinear"}),
    ("vit_base_patch16_224", {"crop_mode": "squash", "crop_pct": 1.0}),
]
# (architecture, published weights)
TORCHVISION_WEIGHTS = [
    ("vit_b_16", "IMAGENET1K_V1"),
    ("vit_b_32", "IMAGENET1K_V1"),
    ("vit_l_16", "IMAGENET1K_V1"),
    ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"),
    ("vit_l_16", "IMAGENET1K_SWAG_E2E_V1"),
    ("vit_h_14", "IMAGENET1K_SWAG_E2E_V1"),
]
# Width and patch size by architecture
TORCHVISION_SHAPES = {
    "vit_b_16": (768, 16),
    "vit_b_32": (768, 32),
    "vit_l_16": (1024, 16),
    "vit_l_32": (1024, 32),
    "vit_h_14": (1280, 14),
}
# Of preprocessor_config.json; resample is Pillow's number of the filter
HUGGING_FACE_PROCESSORS = {
    "squash 224, bilinear": {"size": {"height": 224, "width": 224}, "resample": 2},
    "crop 224 of 256, bicubic": {
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    },
}


class Case(NamedTuple):
    """A library's transform, and ours for the same model, None where its files do not state it."""

    name: str
    theirs: Transform
    ours: Preprocessing | None


# The models have one block and random weights: only what describes their input matters


def timm_case(root: Path, architecture: str, overlay: dict[str, Any]) -> Case:
    """Save a model as timm does for the Hugging Face hub, and read it."""
    differences = ", ".join(f"{key} {value}" for key, value in overlay.items())
    name = f"timm {architecture} {differences}".rstrip()
    model = timm.create_model(architecture, depth=1, pretrained_cfg_overlay=overlay)
    timm.models.save_for_hf(model, str(root / name), safe_serialization=True)
    transform = create_transform(**resolve_data_config({}, model=model))
    return Case(name, cast(Transform, transform), read(root / name).preprocessing)


def torchvision_case(root: Path, architecture: str, weights: str) -> Case:
    """Save a model's state_dict, which has the shapes alone to tell the preprocessing by."""
    published = torchvision.models.get_model_weights(architecture)[weights]
    image_size = published.meta["min_size"][0]
    width, patch_size = TORCHVISION_SHAPES[architecture]
    model = torchvision.models.VisionTransformer(
        image_size, patch_size, num_layers=1, num_heads=16, hidden_dim=width, mlp_dim=64
    )
    file = root / f"{architecture} {weights}.pth"
    torch.save(model.state_dict(), file)
    name = f"torchvision {architecture} {weights}"
    return Case(name, published.transforms(), read(file).preprocessing)


def hugging_face_case(root: Path, backend: str, title: str, processor_config: dict) -> Case:
    """Save a model and its processor; backend: pil or torchvision, which resizes tensors."""
    folder = root / f"{backend} {title}"
    folder.mkdir()
    model = ViTForImageClassification(ViTConfig(num_hidden_layers=1, image_size=224))
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    processor_config = {"image_processor_type": "ViTImageProcessor", **processor_config}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor_config))
    processor = AutoImageProcessor.from_pretrained(folder, backend=backend)

    def transform(image: Image.Image) -> Tensor:
        return processor(image, return_tensors="pt").pixel_values[0]

    return Case(f"Hugging Face {backend}, {title}", transform, read(folder).preprocessing)


def make_cases(root: Path) -> Iterator[Case]:
    """Yield all cases; their files are written to root."""
    for architecture, overlay in TIMM_MODELS:
        yield timm_case(root, architecture, overlay)
    for architecture, weights in TORCHVISION_WEIGHTS:
        yield torchvision_case(root, architecture, weights)
    for backend in ("pil", "torchvision"):
        for title, processor_config in HUGGING_FACE_PROCESSORS.items():
            yield hugging_face_case(root, backend, title, processor_config)


def compare(case: Case, files: list[Path]) -> str:
    """Return the table's row for a case."""
    ours = case.ours
    if ours is None:
        return table_row(case.name, "not stated in the files", "", "", "")

    # From normalized values to steps of a pixel
    steps = 255 * torch.tensor(ours.std).reshape(-1, 1, 1)
    differences = []
    for file in files:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        differences.append((case.theirs(image) - ours(image)).abs() * steps)
    largest = torch.stack([difference.max() for difference in differences])
    mean = torch.stack([difference.mean() for difference in differences]).mean()

    crop = "squash" if ours.eval_crop is None else f"crop {ours.eval_crop:.4g}"
    return table_row(
        case.name,
        f"{ours.image_size[0]}, {crop}, {ours.interpolation}",
        f"{largest.max():.4f}",
        f"{mean:.4f}",
        str(int((largest >= 0.01).sum())),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        files = find_image_files([arguments.folder])
    except DataError as error:
        sys.exit(str(error))

    print(f"{len(files)} images in {arguments.folder}; differences in 8-bit steps\n")
    last_column = "images that differ by 0.01 or more"
    print(table_header("their transform", "ours", "max", "mean", last_column))
    with tempfile.TemporaryDirectory() as root:
        for case in make_cases(Path(root)):
            print(compare(case, files), flush=True)


if __name__ == "__main__":
    main()
