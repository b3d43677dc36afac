"""TODO: say what this file is for."""

import re
from collections.abc import Sequence
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from vit.config.config import flatten, from_dict, to_dict
from vit.errors import ConfigError


def explicit_changes(composed: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """What the command line gives itself: {key: value} of the composed configuration for every override.

    A group (`optimizer=sgd`) gives its whole node; `experiment=…` can touch any key and gives them all.
    """
    keys = [re.split(r"[=@]", override.lstrip("+~"))[0].replace("/", ".") for override in overrides]
    if "experiment" in keys:
        keys = [str(key) for key in composed]
    return {key: OmegaConf.select(composed, key) for key in keys}


# What pretrained weights were trained with, and a model must have to compute what they did; its sizes are the user's choice.
TRAVELS = (
    "layer_norm_eps",
    "activation",
    "resnet_style",
    "qkv_bias",
    "qk_norm",
    "layer_scale",
    "position",
    "cls_token",
    "cls_position",
    "num_registers",
    "global_pool",
    "pruned_heads",
)


ADOPTED = (
    *(f"model.{key}" for key in TRAVELS),
    *(f"data.{key}" for key in ("mean", "std", "eval_crop", "interpolation")),
)


def adopt(
    plain_config: dict[str, Any],
    model: dict[str, Any],
    preprocessing: dict[str, Any] | None,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """A plain configuration with what travels with pretrained weights, but for keys the command line gives itself."""
    wanted = {f"model.{key}": model[key] for key in TRAVELS if key in model}
    if preprocessing is not None:
        wanted |= {
            f"data.{key}": preprocessing[key]
            for key in ("mean", "std", "eval_crop", "interpolation")
        }
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    return with_changes(
        plain_config, {key: value for key, value in wanted.items() if key not in given}
    )


def notable(flat: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Of a flat configuration what tells runs apart on one page: the usual keys, and those the command line gives."""
    given = [override.lstrip("+~").partition("=")[0].replace("/", ".") for override in overrides]
    usual = (
        "model.name",
        "data.name",
        "optimizer.name",
        "optimizer.lr",
        "train.batch_size",
        "seed",
    )
    return {
        key: value
        for key, value in flat.items()
        if key in usual or any(key == name or key.startswith(f"{name}.") for name in given)
    }


# What a resumed run may change without asking: it can't change the result, or (the second) only its last bits.
FREE_TO_CHANGE = (
    "runtime.workers",
    "runtime.device",
    "train.save_every",
    "train.log_every",
    "train.attention_every",
    "data.root",
    "pretrained",
    "pretrained_positions",
    "resume",
    "resume_changed",
    "jobs_at_once",
)


BITS_MAY_DIFFER = (
    "runtime.threads",
    "runtime.compile",
    "runtime.deterministic",
    "runtime.activation_checkpointing",
    "runtime.processes",
    "runtime.sharding",
)


def with_changes(saved: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A plain configuration with some keys set anew."""
    config = OmegaConf.create(saved)
    for key, value in changes.items():
        OmegaConf.update(config, key, value, merge=False)
    return cast(dict[str, Any], OmegaConf.to_container(config, enum_to_str=True))


def resumed(
    saved: dict[str, Any], changes: dict[str, Any], allow: bool
) -> tuple[dict[str, Any], list[str]]:
    """A saved configuration with the changes made to it, and a line for every change worth a warning.

    Raises ConfigError, naming the differences, where a change would change the result and `allow` is false.
    """
    saved = to_dict(from_dict(saved, "config.yaml"))
    container = with_changes(saved, changes)
    before, after = flatten(saved), flatten(container)
    # What a run finds out itself, from pretrained weights or the memory there is, a repeated command does not take back
    found_out = {"train.micro_batch_size"} | (set(ADOPTED) if saved.get("pretrained") else set())
    own = {key: value for key, value in before.items() if key in found_out - changes.keys()}
    container, after = (
        with_changes(container, {key: value for key, value in own.items()}),
        {**after, **own},
    )
    differences = [
        f"{key}: {before.get(key)} → {after.get(key)}"
        for key in {**before, **after}
        if before.get(key) != after.get(key) and key not in FREE_TO_CHANGE
    ]
    refused = [line for line in differences if not line.startswith(BITS_MAY_DIFFER)]
    if refused and not allow:
        raise ConfigError(
            "resuming with another configuration would be another run ("
            + "; ".join(refused)
            + "); leave these as they were, or add resume_changed=allow"
        )
    return container, [
        f"resuming with a change: {line}" + ("" if line in refused else " (last bits may differ)")
        for line in differences
    ]
