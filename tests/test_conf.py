"""The configuration: every file composes, every mistake is named."""

import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from vit.checkpoints.model import build_model
from vit.config.command_line import composition_error, known_keys, prepare_arguments, quote_paths
from vit.config.config import Config, flatten, from_composed, from_dict, register, to_dict, validate
from vit.config.resume import explicit_changes, notable, resumed
from vit.errors import ConfigError

CONF = Path(__file__).parent.parent / "conf"
register()


def composed(*overrides, name="train"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


def names(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (group, name)
        for group in (
            "model",
            "data",
            "augment",
            "optimizer",
            "schedule",
            "train",
            "runtime",
            "experiment",
        )
        for name in names(group)
    ],
)
def test_every_file_composes_to_a_valid_configuration(group, name):
    extra = ["data.root=somewhere"] if "folder" in name or name == "shards" else []
    config = from_composed(composed(f"{group}={name}", *extra))
    validate(config)
    plain = to_dict(config)
    with torch.device("meta"):
        build_model(plain["model"], 10)
    assert from_dict(plain, "test") == config
    if group in ("model", "data", "optimizer", "schedule"):
        assert plain[group]["name"] == name


def test_defaults_are_those_of_the_contract():
    config = from_composed(composed())
    assert (config.model.name, config.data.name.name) == ("vit_s4", "cifar10")
    sgd = from_composed(
        composed(
            "optimizer=sgd",
            "optimizer.lr=0.1",
            "model.patch_size=8",
            "train.epochs=5",
            "train.batch_size=256",
            "model=vit_b16",
        )
    )
    assert (sgd.optimizer.name.name, sgd.optimizer.lr, sgd.model.patch_size) == ("sgd", 0.1, 8)
    assert (sgd.train.epochs, sgd.train.batch_size, sgd.model.hidden_size) == (5, 256, 768)
    assert from_composed(composed("experiment=digits", "model=vit_ti4")).model.name == "vit_ti4"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.lr=0", "optimizer.lr must be a positive number, got 0"),
        ("optimizer.lr=-1e-3", "optimizer.lr must be"),
        ("optimizer.lr=nan", "optimizer.lr must be"),
        ("optimizer.lr=inf", "optimizer.lr must be"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay must be 0 or more"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas must be two numbers"),
        ("train.epochs=0", "train.epochs must be a positive number, got 0"),
        ("train.steps=0", "train.steps must be"),
        ("train.batch_size=0", "train.batch_size must be"),
        ("train.label_smoothing=1", "train.label_smoothing must be at least 0 and below 1"),
        ("data.val_fraction=1.0", "data.val_fraction must be"),
        ("data.limit=0", "data.limit must be"),
        ("data.mean=[0.5,0.5]", "data.mean must hold 1 number"),
        ("data.std=[0.5,0.5,0]", "data.std must be positive"),
        ("model.num_channels=4", "model.num_channels must be 1"),
        ("model.dropout=1", "model.dropout must be"),
        ("augment.flip=1.5", "augment.flip must be from 0 to 1"),
        ("augment.crop_scale=[0.5]", "augment.crop_scale must be"),
        ("runtime.compile=maybe", "runtime.compile must be auto, true or false"),
        ("runtime.workers=-1", "runtime.workers must be"),
        (
            "+optimizer.momentum=0.9",
            "optimizer.momentum does nothing with optimizer=adamw; it belongs to sgd, muon",
        ),
        (
            "optimizer.adamw_lr=1e-3",
            "optimizer.adamw_lr does nothing with optimizer=adamw; it belongs to muon",
        ),
        ("optimizer.layer_decay=1.5", "optimizer.layer_decay must be above 0 and at most 1"),
        (
            "schedule.cooldown=0.2",
            "schedule.cooldown does nothing with schedule=cosine; it belongs to constant",
        ),
        ("schedule.warmup=5epochs", "schedule.warmup must be a share of the run .* got 5epochs"),
        ("schedule.warmup=-1", "schedule.warmup must be a share"),
        ("schedule.warmup=true", "schedule.warmup must be a share"),
        (
            "augment.policy_ops=2",
            "augment.policy_ops does nothing with augment.policy=none; it belongs to the three RandAugments",
        ),
        ("augment.erasing=2", "augment.erasing must be from 0 to 1"),
        ("augment.mixup=-1", "augment.mixup must be 0 or more"),
        (
            "augment.mix_probability=0.5",
            "augment.mix_probability does nothing without augment.mixup or augment.cutmix",
        ),
        (
            "train.drop_path_schedule=constant",
            "train.drop_path_schedule does nothing without model.drop_path",
        ),
        ("data.test_fraction=0.1", "data.test_fraction does nothing with data=cifar10"),
        ("data.root=null", r"data=cifar10 needs data\.root"),
    ],
)
def test_values_out_of_range_are_refused_by_name(override, told):
    with pytest.raises(ConfigError, match=told):
        validate(from_composed(composed(override.lstrip("+"))))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["augment=big_vision", "augment.policy_magnitude=15"],
            "augment.policy_magnitude is of 10 with .*big_vision, got 15",
        ),
        (
            ["schedule=constant", "schedule.cooldown=null", "schedule.final=0.1"],
            "schedule.final does nothing with",
        ),
        (
            ["optimizer=muon", "optimizer.momentum=0"],
            "optimizer.nesterov=true needs optimizer.momentum",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(overrides, told):
    with pytest.raises(ConfigError, match=told):
        validate(from_composed(composed(*overrides)))


def test_a_key_without_a_value_is_named():
    with pytest.raises(ConfigError, match=r"model\.num_heads has no value"):
        from_composed(composed("model.num_heads=???"))
    with pytest.raises(ConfigError, match=r"data=folder needs data\.root=FOLDER"):
        validate(from_composed(composed("data=folder")))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.lrr=3", "optimizer.lrr: no such key; did you mean optimizer.lr"),
        ("optimiser.lr=3", "optimiser.lr: no such key; did you mean optimizer.lr"),
        ("optimiser=sgd", "optimiser: no such key; did you mean optimizer"),
        (
            "model=vit_b17",
            "model=vit_b17: there is no conf/model/vit_b17.yaml; did you mean vit_b16",
        ),
        (
            "experiment=digts",
            "experiment=digts: there is no conf/experiment/digts.yaml; did you mean digits",
        ),
        ("optimizer.lr=fast", "optimizer.lr: Value 'fast'"),
        ("train.epochs=[1]", "train.epochs"),
        ("model.global_pool=max", "model.global_pool.*expected one of .*cls.*mean"),
        ("train.precision=fp8", "train.precision.*expected one of .*bf16"),
        ("model.num_heads=2.5", "model.num_heads: Value '2.5'"),
        ("train.batch_size=", "train.batch_size"),
        ("train.batch_size", "train.batch_size"),
        ("optimizer.lr=(", "optimizer.lr"),
    ],
)
def test_mistakes_in_composing_become_one_line(override, told):
    with pytest.raises((HydraException, OmegaConfBaseException)) as caught:
        composed(override)
    line = composition_error(caught.value, Config)
    assert "\n" not in line
    assert re.search(told, line), line


@pytest.mark.parametrize(
    "value",
    [
        "/a b/ü(1)",
        "/it's",
        "/x=1,y[2]#3",
        "~/pictures",
        "/back\\slash",
        "/end\\",
        "/both\\'",
        "C:{x}",
        "$HOME/&",
    ],
)
def test_any_path_survives_hydras_grammar(value, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    quoted = quote_paths([f"data.root={value}"])
    assert composed(*quoted).data.root == value.replace("~", "/home/me")


def test_paths_that_are_quoted_or_swept_are_left_alone():
    assert quote_paths(["data.root='x y'", "resume=null", "seed=1"]) == [
        "data.root='x y'",
        "resume=null",
        "seed=1",
    ]
    assert quote_paths(["-m", "data.root=a,b"]) == ["-m", "data.root=a,b"]
    assert prepare_arguments(["resume=/r"]) == ["resume='/r'", "hydra.run.dir='/r'"]
    assert prepare_arguments(["resume=auto", "hydra.run.dir=x"]) == [
        "resume=auto",
        "hydra.run.dir='x'",
    ]


def test_what_a_resume_may_change():
    saved = to_dict(from_composed(composed()))
    for overrides, changes in [
        (["train.save_every=7"], {"train.save_every": 7}),
        (["runtime.workers=3"], {"runtime.workers": 3}),
    ]:
        config, warnings = resumed(
            saved, explicit_changes(composed(*overrides), overrides), allow=False
        )
        assert warnings == []
        flat = flatten(config)
        assert all(flat[key] == value for key, value in changes.items())
    overrides = ["runtime.threads=1"]
    assert (
        "bits may differ"
        in resumed(saved, explicit_changes(composed(*overrides), overrides), False)[1][0]
    )
    overrides = ["optimizer=sgd", "train.epochs=3"]
    changes = explicit_changes(composed(*overrides), overrides)
    with pytest.raises(
        ConfigError,
        match=r"optimizer\.name: adamw → sgd.*train\.epochs: 100\.0 → 3\.0.*resume_changed=allow",
    ):
        resumed(saved, changes, allow=False)
    config, warnings = resumed(saved, changes, allow=True)
    assert config["optimizer"]["name"] == "sgd"
    assert len(warnings) >= 2


def test_what_tells_runs_apart():
    flat = flatten(to_dict(from_composed(composed("optimizer=sgd", "model.dropout=0.1"))))
    chosen = notable(flat, ["optimizer=sgd", "model.dropout=0.1"])
    assert {"model.name", "optimizer.lr", "optimizer.momentum", "model.dropout", "seed"} <= set(
        chosen
    )
    assert not {"model.hidden_size", "train.clip_norm"} & set(chosen)


def test_no_unused_option():
    """Every key of the schema is read somewhere outside the schema."""
    root = CONF.parent
    sources = "\n".join(
        path.read_text()
        for path in [*root.glob("vit/**/*.py"), root / "train.py", root / "evaluate.py"]
        if path.parent.name != "config"
    )
    for key in known_keys(Config):
        assert key.rpartition(".")[2] in sources, key


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"randaugment_ops": 0, "randaugment_magnitude": 9}, ("none", None, None)),
        ({"randaugment_ops": 2, "randaugment_magnitude": 7}, ("randaugment", 2, 7.0)),
    ],
)
def test_configurations_of_earlier_versions_are_understood(old, new):
    saved = to_dict(from_composed(composed("experiment=digits")))
    for key in ("policy", "policy_ops", "policy_magnitude", "erasing", "repeats"):
        del saved["augment"][key]
    del saved["train"]["loss"]
    saved["augment"] |= old
    augment = to_dict(from_dict(saved, "old"))["augment"]
    assert (augment["policy"], augment["policy_ops"], augment["policy_magnitude"]) == new
    overrides = [
        "experiment=digits",
        *(
            []
            if new[0] == "none"
            else [f"augment.policy={new[0]}", "augment.policy_ops=2", "augment.policy_magnitude=7"]
        ),
    ]
    assert resumed(saved, explicit_changes(composed(*overrides), overrides), allow=False)[1] == []
