"""What timm's config.json states: the architecture, its arguments and the preprocessing.

timm builds a model of an architecture's name and the arguments that differ from it. The names alone
say which activation, how many heads and which pooling a model has, so they are listed here.
"""

import re
from dataclasses import dataclass
from typing import Any

from vit.data.preprocessing import PIL_RESAMPLING, Preprocessing
from vit.errors import CheckpointError
from vit.weights.config_file import (
    COUNT,
    COUNTS,
    FLAG,
    INDEX,
    NAMES,
    NUMBERS,
    POSITIVE,
    SCALES,
    SIZE,
    TEXT,
    ConfigFile,
    Kind,
)
from vit.weights.description import as_pair, int_or_pair

# The heads of a size, by its name
HEADS = {
    "tiny": 3,
    "xsmall": 4,
    "wee": 4,
    "little": 5,
    "small": 6,
    "small_plus": 6,
    "medium": 8,
    "mediumd": 8,
    "betwixt": 10,
    "base": 12,
    "so150m": 14,
    "so150m2": 13,
    "large": 16,
    "huge": 16,
    "huge_plus": 20,
    "so400m": 16,
    "giant": 16,
    "giantopt": 16,
    "gigantic": 16,
    "7b": 32,
}

MEAN = {"global_pool": "mean"}
MAP = {"global_pool": "map"}
TANH = {"activation": "gelu_tanh"}
CLIP = {"layer_norm_eps": 1e-5}
QUICK = {"activation": "quick_gelu"}
SILU = {"activation": "silu"}
DINOV3 = {"layer_norm_eps": 1e-5, "position": "rope_dinov3"} | MEAN

# {pattern of names: what differs from a class token, gelu and the heads of the size}; the first
# that fits counts. (SIZE) stands for one of HEADS. Architectures with other parts, such as parallel
# branches, are not among them.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "test_vit": {"num_heads": 2},
    "test_vit2": {"num_heads": 2} | MEAN,
    "test_vit3": {"num_heads": 3} | MAP,
    "vit_base_patch16_gap_224": {"num_heads": 16} | MEAN,
    "vit_(base)_patch(16_plus_240|32_plus_256)": {"num_heads": 14},
    # SigLIP's later releases
    "vit_(base)_patch32_siglip_gap_256": MEAN | TANH,
    "vit_(large)_patch16_siglip_gap_512": MEAN | TANH,
    r"vit_(giantopt|so400m)_patch16_siglip_gap_\d+": MEAN | TANH,
    r"vit_(SIZE)_patch\d+_(siglip_)?gap_\d+": MEAN,
    "vit_(base)_patch32_siglip_256": MAP | TANH,
    "vit_(large)_patch16_siglip_512": MAP | TANH,
    r"vit_(giantopt|so400m)_patch16_siglip_\d+": MAP | TANH,
    r"vit_(SIZE)_patch\d+_siglip_\d+": MAP,
    r"vit_(SIZE)_patch16_reg[14]_gap_\d+": MEAN,
    "vit_(so150m)_patch16_reg4_map_256": MAP,
    r"eva_(large)_patch14_\d+": MEAN,
    # CLIP's, of OpenAI and others
    "vit_base_patch16_plus_clip_240": {"num_heads": 14} | CLIP,
    r"vit_(SIZE)_patch\d+_clip_\d+": CLIP,
    r"vit_(SIZE)_patch\d+_clip_quickgelu_\d+": CLIP | QUICK,
    # The names that timm had before 0.9 end in what the weights were trained on.
    r"vit_(SIZE)_patch\d+_\d+(_miil)?(_in21k|_sam|_dino)?": {},
    r"deit_(SIZE)_(distilled_)?patch16_\d+": {},
    r"deit3_(SIZE)_patch\d+_\d+(_in21ft1k)?": {},
    "flexivit_(SIZE)": {},
    "vit_(small|base|large)_patch14_(reg4_)?dinov2": {},
    "vit_(base|large|so400m)_patch14_reg1_tipsv2": {},
    # Their giant models have a gated MLP, and DINOv3's of odd names
    "vit_giant_patch14_(?:reg4_)?dinov2": {"num_heads": 24} | SILU,
    "vit_giant_patch14_reg1_tipsv2": {"num_heads": 24} | SILU,
    "vit_(small_plus|huge_plus|7b)_patch16_dinov3(_qkvb)?": DINOV3 | SILU,
    "vit_(SIZE)_patch16_dinov3(_qkvb)?": DINOV3,
    "vit_(small)_patch16_36x1_224": {},
    r"vit_(SIZE)_r(26|50)_s(16|32)_\d+": {},
}

HYBRID = re.compile(r"_r\d+_s\d+_")

# Their words and ours; an empty text is their other word for none.
ACTIVATIONS = {name: name for name in ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")}
POOLING = {"token": "cls", "avg": "mean", "map": "map"}
POSITIONS = {"learn": "learned", "none": "none", "": "none"}

# {argument: (ours, what it holds)}
ARGUMENTS: dict[str, tuple[str, Kind]] = {
    "img_size": ("image_size", SIZE),
    "patch_size": ("patch_size", SIZE),
    "in_chans": ("num_channels", COUNT),
    "embed_dim": ("hidden_size", COUNT),
    "depth": ("num_layers", COUNT),
    "num_heads": ("num_heads", COUNT),
    "qkv_bias": ("qkv_bias", FLAG),
    "qk_norm": ("qk_norm", FLAG),
    "class_token": ("cls_token", FLAG),
    "reg_tokens": ("num_registers", INDEX),
    "pre_norm": ("pre_norm", FLAG),
}

# Arguments with an effect in training alone, or whose effect the tensors show, and those that are
# read below
UNREAD = {
    "num_classes",
    "mlp_ratio",
    "init_values",
    "no_embed_class",
    "fc_norm",
    "weight_init",
    "fix_init",
    "drop_rate",
    "pos_drop_rate",
    "patch_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
    # Of images of other sizes
    "dynamic_img_size",
    "dynamic_img_pad",
    "strict_img_size",
    "act_layer",
    "global_pool",
    "pos_embed",
}

# Arguments that must not differ from timm's defaults: with other values it is another model
DEFAULTS = {
    "scale_attn_norm": False,
    "scale_mlp_norm": False,
    "proj_bias": True,
    "final_norm": True,
    "pool_include_prefix": False,
}


@dataclass(frozen=True)
class TimmConfig:
    """A config.json of timm's; without a file it states nothing."""

    file: ConfigFile

    @property
    def architecture(self) -> str | None:
        return self.file.get("architecture", TEXT)

    @property
    def pretrained(self) -> ConfigFile:
        """The part about the weights: older files have its keys at the top."""
        return self.file.part("pretrained_cfg") if "pretrained_cfg" in self.file else self.file

    def known_arguments(self) -> dict[str, Any]:
        """What it states of the model, in this project's terms.

        Raises CheckpointError for architectures and arguments that this project doesn't have.
        """
        if self.architecture is None:
            return {}
        arguments = self.file.part("model_args")
        known = settings_of(self.architecture)
        if known is None:
            raise CheckpointError(
                f"{self.file.path}: timm's {self.architecture} can't be loaded; docs/weights.md "
                "lists what can"
            )
        check_arguments(arguments)
        known |= {
            ours: arguments.get(theirs, kind)
            for theirs, (ours, kind) in ARGUMENTS.items()
            if theirs in arguments
        }
        if "image_size" in known:
            known["image_size"] = int_or_pair(as_pair(known["image_size"]))
        if HYBRID.search(self.architecture):
            known.pop("patch_size", None)  # it is in features there
        if "act_layer" in arguments:
            known["activation"] = one_of(arguments, "act_layer", ACTIVATIONS)
        for part in (self.file, arguments):
            if "global_pool" in part:
                known["global_pool"] = one_of(part, "global_pool", POOLING)
        if one_of(arguments, "pos_embed", POSITIONS) == "none":
            known |= {"position": "none", "cls_position": False}
        return known

    def classes(self, count: int | None) -> list[str] | None:
        """The names of so many classes, or None where there are others or none."""
        names = self.pretrained.get("label_names", NAMES) or self.file.get("label_names", NAMES)
        if isinstance(names, dict):
            # Numbers may be left out; then there is no name for every logit
            numbers = sorted(names, key=int)
            complete = [int(number) for number in numbers] == list(range(len(names)))
            names = [names[number] for number in numbers] if complete else None
        return names if names is not None and len(names) == count else None

    def preprocessing(self, num_channels: int) -> Preprocessing | None:
        """The preprocessing; None where it is not stated or not one of ours."""
        stated = self.pretrained
        if any(key not in stated for key in ("mean", "std", "input_size", "interpolation")):
            return None
        crop = stated.get("crop_pct", POSITIVE, 0.875)
        mode = stated.get("crop_mode", TEXT, "center")
        interpolation = stated.get("interpolation", TEXT)
        if interpolation not in PIL_RESAMPLING:
            return None
        # A border is padded, and a squash to more than the model's size is cropped: ours does
        # neither.
        if mode == "border" or (mode == "squash" and crop != 1):
            return None
        size = stated.get("input_size", COUNTS)
        mean, std = stated.get("mean", NUMBERS), stated.get("std", SCALES)
        # (channels, height, width)
        if len(size) != 3 or not {len(mean), len(std)} <= {1, size[0]} or size[0] != num_channels:
            raise CheckpointError(
                f"{stated.path}: input_size {size}, mean {mean} and std {std} must be for "
                f"{num_channels} channels, as the weights are"
            )
        crop = None if mode == "squash" else crop
        shape = (size[1], size[2])
        return Preprocessing(shape, size[0], tuple(mean), tuple(std), crop, interpolation)


def settings_of(architecture: str) -> dict[str, Any] | None:
    """The settings that an architecture's name stands for, or None for one that can't be loaded.

    Such as {"num_heads": 12, "activation": "gelu", "layer_norm_eps": 1e-06, "global_pool": "cls"}.
    """
    sizes = "|".join(HEADS)
    for pattern, differences in ARCHITECTURES.items():
        match = re.fullmatch(pattern.replace("(SIZE)", f"({sizes})"), architecture)
        if match is None:
            continue
        settings: dict[str, Any] = {
            "activation": "gelu",
            "layer_norm_eps": 1e-6,
            "global_pool": "cls",
        }
        if match.groups():
            settings["num_heads"] = HEADS[match[1]]
        return settings | differences
    return None


def check_arguments(arguments: ConfigFile) -> None:
    """Raise CheckpointError for an argument that is not known here, or makes another model."""
    for key in arguments.fields:
        if key not in arguments or key in ARGUMENTS or key in UNREAD:
            continue
        if key not in DEFAULTS or arguments.get(key, FLAG) != DEFAULTS[key]:
            raise CheckpointError(
                f"{arguments.path}: model_args.{key}={arguments.fields[key]} is not known here; "
                "such models can't be loaded"
            )


def one_of(config: ConfigFile, key: str, names: dict[str, str]) -> str | None:
    """Our name for the value of a field, or None where it isn't set.

    Raises CheckpointError where it is none of `names`.
    """
    value = config.get(key, TEXT)
    if value is not None and value not in names:
        raise CheckpointError(
            f"{config.path}: {key} {value or 'of an empty text'} is not known here; known: "
            f"{', '.join(filter(None, names))}"
        )
    return None if value is None else names[value]
