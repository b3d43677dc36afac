"""Configurations that do not come from the command line alone.

A resumed run's comes from its folder; pretrained weights bring the settings they were trained with.
What is given on the command line wins, and is refused where it would make another run of it.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vit.config.config import (
    Config,
    flatten,
    from_current_dict,
    from_dict,
    migrate,
    to_dict,
    with_changes,
)
from vit.config.model import MODEL_SETTINGS_OF_WEIGHTS
from vit.config.settings import BITS_MAY_DIFFER, FREE, settings_of
from vit.errors import ConfigError

PREPROCESSING_OF_WEIGHTS = ("mean", "std", "eval_crop", "interpolation")
ADOPTED_KEYS = {f"model.{key}" for key in MODEL_SETTINGS_OF_WEIGHTS} | {
    f"data.{key}" for key in PREPROCESSING_OF_WEIGHTS
}

# Of a resumed run whose training set loses images
LEAK = (
    "; the run was trained on some of the images held out now, which flatters its accuracy on them"
)

# Keys that tell runs apart on one page, whatever the command line gives
USUAL_KEYS = (
    "model.name",
    "data.name",
    "optimizer.name",
    "optimizer.lr",
    "train.batch_size",
    "seed",
)


def overridden_keys(overrides: Sequence[str]) -> list[str]:
    """Return the keys and groups of overrides, with dots: "+hydra/x=1" gives hydra.x.

    Options such as --config-dir=FOLDER have none.
    """
    typed = [item.lstrip("+~") for item in overrides if not item.startswith("-")]
    return [re.split(r"[=@]", item)[0].replace("/", ".") for item in typed]


def command_line_changes(composed: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """Return {key: value} of the composed configuration for every override of the command line.

    A group (`optimizer=sgd`) gives its whole node.
    """
    keys = overridden_keys(overrides)
    # An experiment can touch any key
    if "experiment" in keys:
        keys = [str(key) for key in composed]
    return {key: OmegaConf.select(composed, key) for key in keys}


def settings_of_weights(model: dict[str, Any], has_conv_stem: bool) -> dict[str, Any]:
    """Return the settings that pretrained weights bring into a model, of those that describe them.

    has_conv_stem: whether the model has the convolutions that strides belong to; if it has not,
    the weights are refused for what they hold.
    """
    keys = set(MODEL_SETTINGS_OF_WEIGHTS)
    if not has_conv_stem:
        keys.remove("conv_stem_strides")
    return {key: value for key, value in model.items() if key in keys}


def with_settings_of_weights(
    config: Config,
    model: dict[str, Any],
    preprocessing: dict[str, Any] | None,
    overrides: Sequence[str],
    source: str,
) -> Config:
    """Return the configuration with the settings that belong to pretrained weights.

    Keys that the command line gives stay as given. model, preprocessing: as a file of weights
    describes them; source: its name, for messages.
    """
    trained_with = settings_of_weights(model, has_conv_stem=config.model.conv_stem is not None)
    adopted = {f"model.{key}": value for key, value in trained_with.items()}
    if preprocessing is not None:
        adopted |= {f"data.{key}": preprocessing[key] for key in PREPROCESSING_OF_WEIGHTS}

    given = set(overridden_keys(overrides))
    changes = {key: value for key, value in adopted.items() if key not in given}
    return from_current_dict(with_changes(to_dict(config), changes), source)


def notable_settings(config: Config, overrides: Sequence[str]) -> dict[str, Any]:
    """Return {key: value} of what tells runs apart on one page.

    These are the usual keys, and those that the command line gives.
    """
    given = overridden_keys(overrides)
    return {
        key: value
        for key, value in flatten(to_dict(config)).items()
        if key in USUAL_KEYS or any(key == name or key.startswith(f"{name}.") for name in given)
    }


def names_same_weights(given: str, saved: str) -> bool:
    """Whether a run that saved this value of `pretrained` may have been given that one.

    A name of the network is saved with what it was resolved to: hf:OWNER/NAME@COMMIT, and
    https://…#sha256=…; see vit/weights/sources.py.
    """
    if given.startswith(("hf:", "timm:")):
        # A branch, which may be given, is saved as the commit it was at
        given, saved = given.partition("@")[0], saved.partition("@")[0]
    return given in (saved, saved.partition("#sha256=")[0])


def with_own_teacher(changed: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Return a changed configuration with the saved teacher where the same name is given again.

    The run's own name of it has the commit, or the checksum, of what was downloaded.
    """
    given, own = changed["train"]["teacher"], saved["train"]["teacher"]
    if given and own and names_same_weights(given, own):
        return with_changes(changed, {"train.teacher": own})
    return changed


def holds_out_more(key: str, before: Any, after: Any) -> bool:
    """Whether a change of this key holds out images that were trained on before it."""
    # null is no limit, and no fraction
    null = {"data.val_fraction": 0, "data.test_fraction": 0, "data.limit": math.inf}.get(key)
    if null is None:
        return False
    return (null if after is None else after) > (null if before is None else before)


def resumed_config(
    saved: dict[str, Any], changes: dict[str, Any], allow: bool, source: str
) -> tuple[Config, list[str]]:
    """Return (the configuration of a resumed run, a warning for every change worth one).

    saved: what the run's config.yaml holds; changes: see command_line_changes; source: the path of
    config.yaml, for messages. Raises ConfigError, naming the differences, where a change would
    change the result and `allow` is false.
    """
    # By way of the schema, so that a run of an earlier version has all keys of this one
    saved = to_dict(from_dict(saved, source))
    changed = with_own_teacher(with_changes(saved, changes), saved)
    # Migrated, so that model.init_range=0.02 typed again is no other than the default it was
    before, after = flatten(saved), flatten(migrate(changed))

    # Repeating the command that started the run must not take back what came with its weights: a
    # group on the command line (model=vit_b16) gives all of its keys
    if saved.get("pretrained"):
        kept = {key: before[key] for key in ADOPTED_KEYS & before.keys() - changes.keys()}
        changed = with_changes(changed, kept)
        after |= kept

    # The same weights again are of the command that started the run, repeated
    given = changes.get("pretrained")
    if given is not None and not names_same_weights(given, before["pretrained"] or ""):
        raise ConfigError(
            "pretrained does nothing beside resume: the run's weights are in its checkpoint; "
            "leave it out"
        )

    rules = {item.key: item.on_resume for item in settings_of(Config)}
    refused, warnings = [], []
    # The keys of both: dictionaries such as pruned_heads may have other keys than before
    for key in {**before, **after}:
        rule = rules.get(key)
        if before.get(key) == after.get(key) or rule == FREE:
            continue
        # A teacher that lies elsewhere now is known by its checksum, where it is read
        if key == "train.teacher" and before[key] and after[key]:
            continue
        line = f"{key}: {before.get(key)} → {after.get(key)}"
        if rule == BITS_MAY_DIFFER:
            warnings.append(f"resuming with a change: {line} (last bits may differ)")
        else:
            refused.append(line)
            leaks = holds_out_more(key, before.get(key), after.get(key))
            warnings.append(f"resuming with a change: {line}{LEAK if leaks else ''}")

    if refused and not allow:
        raise ConfigError(
            f"resuming with another configuration would be another run ({'; '.join(refused)}); "
            "leave these as they were, or add resume_changed=allow"
        )
    return from_current_dict(changed, source), warnings
