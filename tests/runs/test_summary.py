"""What a run advises where it is expensive, and its last lines."""

import pytest
from hydra import compose, initialize_config_dir

from vit.config.config import CONF, from_composed, register
from vit.runs.folder import RunFolder
from vit.runs.summary import cheaper_setting, log_result

register()


def configuration(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return from_composed(compose("train", list(overrides)))


@pytest.mark.parametrize(
    ("overrides", "macs", "setting"),
    [
        (["data=cifar100"], 17e9, "model=vit_s4"),
        (["data=cifar100"], 1.4e9, "model=vit_ti4"),
        (["data=cifar100", "train.epochs=10"], 0.35e9, "train.epochs=2.5"),
        (["data=cifar100", "train.steps=1000"], 0.35e9, "train.steps=250"),
        (["data=imagenet"], 17e9, "model=vit_s16"),
        (["data=imagenet", "train.epochs=300"], 1.26e9, "train.epochs=75"),
        # Their weights do not fit another model
        (["experiment=finetune_folder_vit_b16"], 17e9, "train.freeze=backbone"),
        (["experiment=finetune_folder_vit_b16", "train.lora_rank=8"], 17e9, "train.epochs=12.5"),
        (["experiment=finetune_cifar10_vit_b16", "train.lora_rank=8"], 17e9, "train.steps=2500"),
    ],
)
def test_a_cheaper_run_takes_less_than_half_the_work(overrides, macs, setting):
    """One setting beside those that were typed: data.root, a recipe or a model is not lost."""
    small = "data=cifar100" in overrides
    assert cheaper_setting(int(macs), configuration(*overrides), small) == setting


TEST = {"top1": 0.25, "balanced_top1": 0.125, "macro_f1": 0.1, "loss": 1.0, "n": 400}
BEST = {"top1": 0.5, "balanced_top1": 0.375, "macro_f1": 0.3, "loss": 2.0}


def last_lines(folder, lines, best=BEST, select="top1", note=""):
    log_result(
        RunFolder(folder / "run"),
        best=best,
        best_step=7,
        select=select,
        test=TEST,
        seconds=65.0,
        val_title="Digits val, 100 images",
        test_title="Digits test, 400 images",
        note=note,
    )
    return "\n".join(lines)


@pytest.mark.parametrize("best", [BEST, dict.fromkeys(BEST)], ids=["val", "no val"])
def test_the_last_lines_say_what_was_reached_and_what_to_do_next(tmp_path, log_lines, best):
    text = last_lines(tmp_path, log_lines, best)
    for part in ("25.00%", "400 images", "1:05", "evaluate.py checkpoint=", "tensorboard --logdir"):
        assert part in text
    assert ("best validation top-1  50.00%, after step 7" in text) == (best is BEST)
    assert "balanced" not in text


@pytest.mark.parametrize(
    ("select", "line"),
    [
        ("macro_f1", "best validation macro F1 30.00% (top-1 50.00%), after step 7"),
        ("loss", "best validation loss   2.0000 (top-1 50.00%), after step 7"),
    ],
)
def test_the_last_lines_name_what_was_selected_by(tmp_path, log_lines, select, line):
    assert line in last_lines(tmp_path, log_lines, select=select)


def test_the_last_lines_tell_the_balanced_accuracy_of_unbalanced_classes(tmp_path, log_lines):
    text = last_lines(tmp_path, log_lines, note="always cat would be 25.00%")
    assert "top-1  50.00% (balanced accuracy 37.50%), after step 7" in text
    assert "test top-1             25.00% (balanced accuracy 12.50%), 95 % interval" in text
    assert text.splitlines()[1].endswith("(Digits test, 400 images); always cat would be 25.00%")
