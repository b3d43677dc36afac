"""One small model of every family in the table of docs/weights.md, as its own library builds it."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision
import transformers
import vit_pytorch
from foreign_models import images, shaken
from helpers import ROOT
from torch import Tensor, nn

from vit.model.vision_transformer import Trace

PAGE = ROOT / "docs" / "weights.md"
HEADING = "## Which models can be loaded"


@dataclass(frozen=True)
class Row:
    """A row of the table.

    families    names of architectures or model types, with * for any characters
    example     the one that is built here
    bare, folder    the verdict on a file alone, and on a folder of the library's own: `loads`,
                `loads, assuming KEY`, `refused`, or — where the library has none
    reason      for people; what stands in it in backticks must be in the message about a bare file
    """

    library: str
    families: list[str]
    example: str
    bare: str
    folder: str
    reason: str

    def __str__(self) -> str:
        return self.example


def rows() -> list[Row]:
    """The table of docs/weights.md."""
    section = PAGE.read_text(encoding="utf-8").partition(HEADING)[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return [
        Row(library, re.findall("`(.*?)`", families), example.strip("`"), bare, folder, reason)
        for library, families, example, bare, folder, reason in cells
    ]


# Two heads of the usual width, where an architecture lets itself be made smaller
TIMM_SIZES = {"depth": 2, "embed_dim": 128, "num_heads": 2, "num_classes": 5, "img_size": 64}

# {architecture: changes to TIMM_SIZES}; None leaves the architecture's own value
TIMM_CHANGES: dict[str, dict] = {
    "test_vit": {"embed_dim": None, "num_heads": None},
    "vit_small_patch14_dinov2": {"img_size": 56},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},
    "vit_giant_patch14_dinov2": {"img_size": 56},
    "vit_base_patch14_reg1_tipsv2": {"img_size": 56},
    "vit_giant_patch14_reg1_tipsv2": {"img_size": 56},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "vit_pe_core_tiny_patch16_384": {"embed_dim": None, "num_heads": None},
    "vit_small_plus_patch16_dinov3": {"embed_dim": None, "num_heads": None},
    "vit_base_patch16_sapiens2": {"num_kv_heads": 1},
    "vit_base_r50_s16_224": {"depth": 1},
    "naflexvit_base_patch16_gap": {"img_size": None},
    "samvit_base_patch16_224": {"img_size": 224},
    "aimv2_large_patch14_224": {"img_size": 56},
    "vit_huge_patch14_gap_224": {"img_size": 56},
    "eva_large_patch14_196": {"img_size": 56},
    "vit_intern300m_patch14_448": {"img_size": 56},
    "vit_base_mci_224": {"embed_dim": None, "num_heads": None},
}


def timm_family(name: str) -> nn.Module:
    arguments = {**TIMM_SIZES, **TIMM_CHANGES.get(name, {})}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    return shaken(timm.create_model(name, **arguments))


HF_SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "image_size": 64,
    "patch_size": 16,
}

# {class: changes to HF_SIZES}; None leaves the class's own value
HF_CHANGES: dict[str, dict] = {
    "ViTMAEForPreTraining": {
        "decoder_hidden_size": 64,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 64,
    },
    # All patches are seen, so that the features are comparable
    "ViTMAEModel": {"mask_ratio": 0.0},
    "YolosModel": {"image_size": [64, 64]},
    "HieraForImageClassification": {"image_size": None, "patch_size": None},
}


def hf_family(name: str) -> nn.Module:
    kind = getattr(transformers, name)
    wanted = {**HF_SIZES, **HF_CHANGES.get(name, {})}
    if name.endswith("ForImageClassification"):
        wanted["num_labels"] = 5
    default = kind.config_class()
    arguments = {
        key: value
        for key, value in wanted.items()
        if value is not None and (hasattr(default, key) or key == "num_labels")
    }
    return shaken(kind(kind.config_class(**arguments)))


def torchvision_family(name: str) -> nn.Module:
    stem = None
    if name == "VisionTransformer with conv_stem_configs":
        config = torchvision.models.vision_transformer.ConvStemConfig
        stem = [config(32, 3, 4), config(128, 3, 4)]
    model = torchvision.models.VisionTransformer(
        image_size=64,
        patch_size=16,
        num_layers=2,
        num_heads=2,
        hidden_dim=128,
        mlp_dim=256,
        num_classes=5,
        conv_stem_configs=stem,
    )
    return shaken(model)


def vit_pytorch_family(name: str) -> nn.Module:
    sizes = {"image_size": 64, "patch_size": 16, "num_classes": 5, "dim": 128}
    kind = getattr(vit_pytorch, name)
    return shaken(kind(**sizes, depth=2, heads=2, mlp_dim=256))


BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "timm": timm_family,
    "Hugging Face": hf_family,
    "torchvision": torchvision_family,
    "vit-pytorch": vit_pytorch_family,
}


def save_folder(row: Row, model: nn.Module, folder: Path) -> None:
    """Save as the library itself does for the Hugging Face hub."""
    if row.library == "timm":
        timm.models.save_for_hf(model, folder, safe_serialization=True)
        # The architecture's own name, whatever changes were recorded beside it
        assert json.loads((folder / "config.json").read_text())["architecture"] == row.example
    else:
        model.save_pretrained(folder)


def true_setting(theirs: nn.Module, key: str) -> float:
    """What a file alone doesn't state, as their model has it."""
    if hasattr(theirs, "config"):
        return getattr(theirs.config, key)
    return getattr(theirs.blocks[0].attn, key)


def largest_difference(theirs: nn.Module, trace: Trace, size: int) -> float:
    """Between the logits of their model, or its features where it has no head, and ours."""
    with torch.inference_mode():
        outputs = theirs(images(size))
    if isinstance(outputs, Tensor):
        return (outputs - trace.logits).abs().max().item()
    if getattr(outputs, "logits", None) is not None:
        return (outputs.logits - trace.logits).abs().max().item()
    if getattr(outputs, "image_embeds", None) is not None:
        projected = theirs.visual_projection(trace.pooled)
        return (outputs.image_embeds - projected).abs().max().item()
    # CLIP's last norm is of the class token alone
    if theirs.config.model_type in ("clip_vision_model", "siglip_vision_model"):
        return (outputs.pooler_output - trace.pooled).abs().max().item()
    features = outputs.last_hidden_state
    if hasattr(outputs, "ids_restore"):
        # ViT-MAE shuffles the patches
        order = outputs.ids_restore[..., None].expand(-1, -1, features.shape[-1])
        features = torch.cat([features[:, :1], features[:, 1:].gather(1, order)], dim=1)
    return (features - trace.sequence).abs().max().item()
