"""What a run advises where it is expensive, and its last lines."""

import pytest
from hydra import compose, initialize_config_dir

from vit.config.config import CONF, from_composed, register
from vit.runs.folder import RunFolder
from vit.runs.summary import cheaper_command, log_result

register()


def configuration(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return from_composed(compose("train", list(overrides)))


@pytest.mark.parametrize(
    ("overrides", "macs", "end"),
    [
        (["data=cifar100"], 17e9, "data=cifar100 model=vit_s4"),
        (["data=cifar100"], 1.4e9, "data=cifar100 model=vit_ti4"),
        (["data=cifar100", "train.epochs=10"], 0.35e9, "data=cifar100 train.epochs=2.5"),
        (["data=imagenet"], 17e9, "data=imagenet model=vit_s16"),
        (["data=imagenet", "train.epochs=300"], 1.26e9, "data=imagenet train.epochs=75"),
    ],
)
def test_a_cheaper_run_takes_less_than_half_the_work(overrides, macs, end):
    small = "data=cifar100" in overrides
    command = cheaper_command(int(macs), configuration(*overrides), small)
    assert command == f"python train.py {end}"


@pytest.mark.parametrize("best_top1", [0.5, None])
def test_the_last_lines_say_what_was_reached_and_what_to_do_next(tmp_path, log_lines, best_top1):
    log_result(
        RunFolder(tmp_path / "run"),
        best_top1=best_top1,
        best_step=7,
        test={"top1": 0.25, "n": 400, "loss": 1.0},
        seconds=65.0,
        val_title="Digits val, 100 images",
        test_title="Digits test, 400 images",
    )
    text = "\n".join(log_lines)
    for part in ("25.00%", "400 images", "1:05", "evaluate.py checkpoint=", "tensorboard --logdir"):
        assert part in text
    assert ("50.00%, after step 7" in text) == (best_top1 is not None)
