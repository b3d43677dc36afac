"""Keys that are typed in vain: beside the other settings they would change nothing.

A run whose settings are silently ignored is compared under a wrong name. Keys that have no value
unless they are given declare what they belong to (`setting(belongs=…)`). Those here have a value
always, so that only the command line tells whether somebody means it. Values that files of conf/
give, and those of a run that is resumed, are not looked at.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from vit.config.config import Config
from vit.config.model import ModelConfig
from vit.config.resume import overridden_keys
from vit.config.train import freezes_all_blocks
from vit.errors import ConfigError


def trains_no_block(config: Config) -> bool:
    return freezes_all_blocks(config.train.freeze, config.model.num_layers)


def trains_all(config: Config) -> bool:
    return config.train.freeze == "none"


class Case(NamedTuple):
    """A key, when it does nothing, and beside what: the end of "KEY does nothing …"."""

    key: str
    in_vain: Callable[[Config], bool]
    beside: str


CASES = (
    Case(
        "model.mlp_ratio",
        lambda config: config.model.intermediate_size is not None,
        "with model.intermediate_size, which is the MLP's width itself",
    ),
    Case(
        "model.dropout",
        lambda config: (
            None
            not in (
                config.model.embedding_dropout,
                config.model.projection_dropout,
                config.model.mlp_dropout,
            )
        ),
        "where embedding_dropout, projection_dropout and mlp_dropout are all given",
    ),
    Case(
        "model.cls_position",
        lambda config: not (config.model.cls_token and config.model.position == "learned"),
        "without model.cls_token=true and model.position=learned",
    ),
    Case(
        "model.resnet_style",
        lambda config: config.model.resnet_stages is None,
        "without model.resnet_stages",
    ),
    Case(
        "model.conv_stem_strides",
        lambda config: (
            config.model.conv_stem_strides is not None and config.model.conv_stem is None
        ),
        "without model.conv_stem",
    ),
    Case(
        "data.mirror",
        lambda config: config.data.mirror and not config.augment.flip,
        "without augment.flip above 0",
    ),
    Case(
        "augment.flip",
        lambda config: config.augment.flip > 0 and not config.data.mirror,
        "with data.mirror=false: a mirrored image would be of another class",
    ),
    Case(
        "augment.alternating_flip",
        lambda config: config.augment.alternating_flip and not config.data.mirror,
        "with data.mirror=false: a mirrored image would be of another class",
    ),
    Case(
        "train.epochs",
        lambda config: config.train.steps is not None,
        "beside train.steps, which wins (unless train.steps=null is given too)",
    ),
    Case(
        "train.class_weights",
        lambda config: config.train.class_weights != "none" and config.data.balance == 1,
        "with data.balance=1, which draws all classes equally often",
    ),
    Case(
        "train.class_weights",
        lambda config: config.train.class_weights != "none" and config.train.distill_weight == 1,
        "with train.distill_weight=1, which leaves the labels no part in the loss",
    ),
    Case(
        "train.label_smoothing",
        lambda config: config.train.label_smoothing > 0 and config.train.distill_weight == 1,
        "with train.distill_weight=1, which leaves the labels no part in the loss",
    ),
    Case(
        "runtime.compile",
        lambda config: (
            config.runtime.compile not in (False, "auto") and config.runtime.sharding != "none"
        ),
        "with runtime.sharding, whose models are not compiled",
    ),
    Case(
        "pretrained_positions",
        lambda config: config.pretrained is None,
        "without pretrained=FILE",
    ),
)

# What acts in training alone does nothing in a frozen part, which gives fixed features
NO_BLOCK = "with a train.freeze that leaves no block to be trained"
DROPPED_IN_BLOCKS = (
    "dropout",
    "drop_path",
    "attention_dropout",
    "projection_dropout",
    "mlp_dropout",
)
CASES_OF_FREEZING = (
    *(
        Case(key, trains_no_block, NO_BLOCK)
        for key in ("optimizer.layer_decay", "train.drop_path_schedule")
    ),
    *(
        Case(
            f"optimizer.{key}",
            lambda config: config.optimizer.name == "muon" and trains_no_block(config),
            f"{NO_BLOCK}, since Muon has no matrix then",
        )
        for key in ("momentum", "nesterov")
    ),
    *(
        Case(
            f"model.{key}",
            lambda config, key=key: bool(getattr(config.model, key)) and trains_no_block(config),
            NO_BLOCK,
        )
        for key in DROPPED_IN_BLOCKS
    ),
    *(
        Case(
            f"model.{key}",
            lambda config, key=key: bool(getattr(config.model, key)) and not trains_all(config),
            "with a train.freeze that leaves the embeddings as they are",
        )
        for key in ("embedding_dropout", "patch_dropout")
    ),
    Case(
        "runtime.activation_checkpointing",
        lambda config: config.runtime.activation_checkpointing and trains_no_block(config),
        f"{NO_BLOCK}: no activations are kept",
    ),
)

# Small images in memory, and image files that worker processes decode, are augmented differently
CASES_OF_MEMORY = (
    Case(
        "augment.crop_scale",
        lambda config: config.augment.crop_scale is not None and config.augment.pad > 0,
        "with augment.pad above 0: small images are cropped in one of these ways",
    ),
    Case(
        "data.unreadable",
        lambda config: True,
        "with this data set, which has no image files",
    ),
)
CASES_OF_FILES = (
    Case(
        "augment.pad",
        lambda config: config.augment.pad > 0,
        "with image files, which augment.crop_scale crops",
    ),
)

# What the data shows: classes of equal size, and nothing to select a checkpoint by
CASES_OF_EQUAL_CLASSES = (
    Case(
        "data.balance",
        lambda config: config.data.balance > 0,
        "here: all classes have equally many training images",
    ),
    Case(
        "train.class_weights",
        lambda config: config.train.class_weights != "none",
        "here: all classes have equally many training images",
    ),
)
CASES_WITHOUT_VALIDATION = (
    Case(
        "train.select",
        lambda config: True,
        "here: nothing is held out to select by, and the last weights are taken",
    ),
)


def check_typed_model(model: ModelConfig, typed: Collection[str]) -> None:
    """check_typed() for the group `model` alone; typed: keys with dots, such as model.mlp_ratio."""
    of_model = [case for case in CASES if case.key.startswith("model.")]
    check_cases(of_model, Config(model=model), typed)


def check_typed(config: Config, overrides: Sequence[str], reads_files: bool) -> None:
    """Raise ConfigError for the first key of the command line that would change nothing.

    reads_files: whether the images are in files, and not all in memory.
    """
    of_data = CASES_OF_FILES if reads_files else CASES_OF_MEMORY
    typed = set(overridden_keys(overrides))
    # Whoever types both lengths sees both; those of a recipe or a resumed run are not in sight
    if "train.steps" in typed:
        typed.discard("train.epochs")
    check_cases(CASES + CASES_OF_FREEZING + of_data, config, typed)


def check_typed_with_data(
    config: Config, overrides: Sequence[str], *, equal_classes: bool, has_validation: bool
) -> None:
    """check_typed() for what shows only once the data is read.

    equal_classes: all classes have equally many training images.
    """
    cases = CASES_OF_EQUAL_CLASSES if equal_classes else ()
    if not has_validation:
        cases += CASES_WITHOUT_VALIDATION
    check_cases(cases, config, overridden_keys(overrides))


def check_cases(cases: Sequence[Case], config: Config, typed: Collection[str]) -> None:
    for case in cases:
        if case.key in typed and case.in_vain(config):
            raise ConfigError(f"{case.key} does nothing {case.beside}; leave it out")
