"""What a resumed run may change, and the settings that travel with pretrained weights."""

import pytest
from composing import composed, configured

from vit.config.config import flatten, to_dict, validate
from vit.config.resume import (
    ADOPTED_KEYS,
    command_line_changes,
    notable_settings,
    overridden_keys,
    resumed_config,
    with_settings_of_weights,
)
from vit.errors import ConfigError

WEIGHTS = {"hidden_size": 768, "layer_norm_eps": 1e-6, "qk_norm": True, "global_pool": "mean"}
PREPROCESSING = {
    "image_size": [224, 224],
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.2, 0.2],
    "eval_crop": 0.9,
    "interpolation": "bicubic",
}


def resume(saved, *overrides, allow=False):
    """(the flat configuration of the resumed run, its warnings)."""
    changes = command_line_changes(composed(*overrides), overrides)
    config, warnings = resumed_config(saved, changes, allow, "run/config.yaml")
    return flatten(to_dict(config)), warnings


@pytest.fixture
def saved():
    """The configuration of a run."""
    return to_dict(configured())


def test_keys_of_overrides():
    overrides = ["optimizer=sgd", "+optimizer.eps=1", "~train.steps", "hydra/launcher=joblib"]
    assert overridden_keys(overrides) == [
        "optimizer",
        "optimizer.eps",
        "train.steps",
        "hydra.launcher",
    ]


def test_an_experiment_may_change_every_key():
    overrides = ["experiment=digits"]
    changes = command_line_changes(composed(*overrides), overrides)
    assert {"model", "data", "augment", "optimizer", "schedule", "train", "seed"} <= changes.keys()


def test_nothing_given_changes_nothing(saved):
    flat, warnings = resume(saved)
    assert flat == flatten(saved)
    assert warnings == []


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.save_every=7", 7),
        ("train.log_every=3", 3),
        ("train.patience=3", 3),
        ("runtime.max_minutes=90", 90),
        ("runtime.workers=3", 3),
        ("runtime.device=cpu", "cpu"),
        ("data.root=elsewhere", "elsewhere"),
    ],
)
def test_what_can_not_change_the_result_is_free(saved, override, value):
    flat, warnings = resume(saved, override)
    assert flat[override.partition("=")[0]] == value
    assert warnings == []


@pytest.mark.parametrize(
    "override",
    [
        "runtime.threads=1",
        "runtime.compile=true",
        "runtime.processes=2",
        "train.micro_batch_size=8",
        "runtime.activation_checkpointing=true",
    ],
)
def test_what_may_change_the_last_bits_is_a_warning(saved, override):
    key, _, value = override.partition("=")
    flat, (warning,) = resume(saved, override)
    assert str(flat[key]).lower() == value
    assert f"{key}: " in warning
    assert "bits may differ" in warning


def test_what_changes_the_result_is_refused_by_name(saved):
    overrides = ["optimizer=sgd", "train.epochs=3"]
    message = r"optimizer\.name: adamw → sgd.*train\.epochs: 100\.0 → 3\.0.*resume_changed=allow"
    with pytest.raises(ConfigError, match=message):
        resume(saved, *overrides)
    flat, warnings = resume(saved, *overrides, allow=True)
    assert (flat["optimizer.name"], flat["train.epochs"]) == ("sgd", 3.0)
    assert any("optimizer.name: adamw → sgd" in warning for warning in warnings)
    assert any("train.epochs: 100.0 → 3.0" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("key", "before", "after", "leaks"),
    [
        ("data.val_fraction", "0", "0.1", True),
        ("data.val_fraction", "0.1", "0.05", False),
        ("data.test_fraction", "null", "0.1", True),
        # The images that are held out of more images are others
        ("data.limit", "1000", "null", True),
        ("data.limit", "null", "1000", False),
        ("train.epochs", "1", "2", False),
    ],
)
def test_a_change_that_holds_out_what_was_trained_on_is_told(key, before, after, leaks):
    saved = to_dict(configured(f"{key}={before}"))
    (warning,) = resume(saved, f"{key}={after}", allow=True)[1]
    assert ("was trained on some of the images held out now" in warning) == leaks


def test_the_same_again_is_no_change(saved):
    assert resume(saved, "optimizer=adamw", "seed=0", "train.epochs=100")[1] == []


def test_removed_heads_are_compared_head_by_head(saved):
    saved["model"]["pruned_heads"] = {0: [1]}
    assert resume(saved, "model.pruned_heads={0: [1]}")[1] == []
    with pytest.raises(ConfigError, match=r"model\.pruned_heads"):
        resume(saved, "model.pruned_heads={0: [1], 3: [2]}")
    with pytest.raises(ConfigError, match=r"model\.pruned_heads"):
        resume(saved, "model=vit_s4")


@pytest.mark.parametrize("init", ["jax", "xavier", "trunc_normal"])
def test_the_init_range_that_earlier_versions_wrote_beside_every_init(saved, init):
    """It was 0.02 always, and had an effect with trunc_normal alone."""
    saved["model"] |= {"init": init, "init_range": 0.02}
    group = ["model=vit_s4", f"model.init={init}"]
    for overrides in ([], [f"model.init={init}"], group):
        flat, warnings = resume(saved, *overrides)
        assert flat["model.init_range"] is None
        assert warnings == []
    # Without an effect it could be anything
    saved["model"]["init_range"] = 0.5
    if init != "trunc_normal":
        assert resume(saved)[0]["model.init_range"] is None
        return
    assert resume(saved)[0]["model.init_range"] == 0.5
    with pytest.raises(ConfigError, match=r"model\.init_range: 0\.5 → None"):
        resume(saved, *group)


def test_an_init_range_that_is_typed_again(saved):
    saved["model"] |= {"init": "trunc_normal", "init_range": 0.02}
    overrides = ["model.init=trunc_normal", "model.init_range=0.02"]
    assert resume(saved, *overrides)[1] == []
    saved["model"] |= {"init": "jax", "init_range": None}
    changes = command_line_changes(composed("model.init_range=0.05"), ["model.init_range=0.05"])
    config, _ = resumed_config(saved, changes, allow=False, source="run/config.yaml")
    with pytest.raises(ConfigError, match=r"^model\.init_range does nothing with model\.init=jax"):
        validate(config)


def test_a_broken_configuration_names_its_file(saved):
    del saved["model"]["hidden_size"]
    with pytest.raises(ConfigError, match=r"^run/config\.yaml: "):
        resume(saved)


def test_settings_of_weights_are_taken_but_for_what_is_given():
    overrides = ["data=folder", "data.root=x", "data.mean=[0.1,0.1,0.1]"]
    config = configured(*overrides)
    adopted = with_settings_of_weights(config, WEIGHTS, PREPROCESSING, overrides, "weights.npz")
    flat = flatten(to_dict(adopted))
    assert (flat["model.qk_norm"], flat["model.global_pool"]) == (True, "mean")
    assert (flat["data.std"], flat["data.eval_crop"]) == ([0.2, 0.2, 0.2], 0.9)
    # The command line's word counts more
    assert flat["data.mean"] == [0.1, 0.1, 0.1]
    # The size is the user's choice
    assert flat["model.hidden_size"] == config.model.hidden_size
    changed = {key for key, value in flatten(to_dict(config)).items() if flat[key] != value}
    assert changed <= ADOPTED_KEYS


def test_strides_of_weights_are_taken_where_there_are_convolutions():
    """Without any, the weights are refused for their convolutions and not for the strides."""
    weights = {"conv_stem": [16, 16], "conv_stem_strides": [1, 2]}
    for overrides, strides in ((["model.conv_stem=[16,16]"], [1, 2]), ([], None)):
        config = configured(*overrides)
        adopted = with_settings_of_weights(config, weights, None, overrides, "weights")
        assert adopted.model.conv_stem_strides == strides


def test_weights_without_preprocessing_leave_the_data_as_configured():
    config = configured()
    adopted = with_settings_of_weights(config, WEIGHTS, None, [], "weights.npz")
    assert adopted.data == config.data


def test_repeating_the_command_does_not_take_back_what_came_with_weights():
    overrides = ["model=vit_s4", "data=cifar10", "pretrained=weights.npz"]
    config = configured(*overrides)
    adopted = with_settings_of_weights(config, WEIGHTS, PREPROCESSING, overrides, "weights.npz")
    saved = to_dict(adopted)
    flat, warnings = resume(saved, *overrides)
    assert flat == flatten(saved)
    assert warnings == []
    with pytest.raises(ConfigError, match=r"model\.qk_norm: True → False"):
        resume(saved, *overrides, "model.qk_norm=false")


@pytest.mark.parametrize(
    ("given", "saved_name", "is_same"),
    [
        ("hf:a/b", "hf:a/b@0123", True),
        ("hf:a/b@main", "hf:a/b@0123", True),
        ("timm:c.d", "timm:c.d@0123", True),
        ("google:x", "google:x#sha256=12", True),
        ("https://h/x.npz", "https://h/x.npz#sha256=12", True),
        ("https://h/x.npz#sha256=12", "https://h/x.npz#sha256=12", True),
        ("x.npz", "x.npz", True),
        ("hf:a/c", "hf:a/b@0123", False),
        ("timm:a/b", "hf:a/b@0123", False),
        ("https://h/x.npz#sha256=34", "https://h/x.npz#sha256=12", False),
        ("y.npz", "x.npz", False),
    ],
)
def test_the_command_may_be_repeated_with_the_name_that_it_gave(given, saved_name, is_same):
    saved = to_dict(configured()) | {"pretrained": saved_name}
    if is_same:
        assert resume(saved, f"pretrained='{given}'")[1] == []
    else:
        with pytest.raises(ConfigError, match="pretrained does nothing beside resume"):
            resume(saved, f"pretrained='{given}'")


def test_what_tells_runs_apart():
    overrides = ["optimizer=sgd", "model.dropout=0.1"]
    chosen = notable_settings(configured(*overrides), overrides)
    assert {"model.name", "optimizer.lr", "optimizer.momentum", "model.dropout", "seed"} <= set(
        chosen
    )
    assert not {"model.hidden_size", "train.clip_norm"} & set(chosen)
