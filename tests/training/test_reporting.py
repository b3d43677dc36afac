"""What a run says of its classes before it starts, and what it makes of them."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from composing import configured
from PIL import Image
from small_training import MadeUpBatches, make_observer, make_plan, make_state, make_step

from vit.data.class_balance import balanced_weights
from vit.data.splits import ImageDataset, ImageSplit
from vit.runtime.machine import Machine
from vit.runtime.processes import Processes
from vit.training.prepare import (
    cost_of,
    has_unbalanced_split,
    make_class_weights,
    make_order,
    training_sizes,
)
from vit.training.reporting import (
    describe_bottleneck,
    note_on_classes,
    note_on_size,
    note_on_test_classes,
)

CPU = torch.device("cpu")


def data_of(*sizes, validates=True):
    """A data set of three classes, cat, owl and yak, with so many training images."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    train = ImageSplit("animals", labels, torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8))
    return ImageDataset(["cat", "owl", "yak"], train, train if validates else None, train)


def note(data, *overrides):
    return note_on_classes(configured("train.batch_size=8", *overrides), data)


def test_classes_of_unequal_size_are_told_with_what_may_be_done():
    line = note(data_of(48, 9, 16))
    assert "48 cat, 16 yak, 9 owl" in line
    for key in ("data.balance=1", "train.class_weights=balanced", "train.select=balanced_top1"):
        assert key in line
    assert "\n" not in line
    assert note(data_of(27, 9, 9)) is None
    assert note(data_of(28, 9, 9)) is not None


def test_what_is_done_already_or_would_do_nothing_is_no_advice():
    data = data_of(48, 9, 9)
    assert "data.balance" not in note(data, "data.balance=0.5")
    assert "train.class_weights" in note(data, "data.balance=0.5")
    assert "train.class_weights" not in note(data, "data.balance=1")
    assert "train.select" not in note(data, "train.select=macro_f1")
    assert "train.select" in note(data, "train.select=loss")
    assert "train.select" not in note(data_of(48, 9, 9, validates=False))
    everything = ("data.balance=1", "train.select=macro_f1")
    assert note(data, *everything).endswith("48 cat, 9 owl, 9 yak")


def test_accuracy_alone_would_mislead_where_any_split_is_unbalanced():
    equal, unequal = data_of(4, 4, 4), data_of(9, 2, 2)
    assert not has_unbalanced_split(equal)
    assert has_unbalanced_split(unequal)
    for split in ("train", "val", "test"):
        assert has_unbalanced_split(replace(equal, **{split: unequal.train}))
    assert not has_unbalanced_split(replace(equal, val=None))


def test_what_the_largest_class_alone_would_get_is_told():
    assert note_on_test_classes(data_of(6, 1, 1)) == "always cat would be 75.00%"


def test_classes_are_drawn_equally_where_that_is_asked_for():
    data = data_of(48, 9, 15)
    plain = make_order(configured("train.batch_size=8"), data)
    assert plain.draws is None
    # Classes of equal size are drawn equally often anyway
    assert make_order(configured("data.balance=1"), data_of(24, 24, 24)).draws is None
    balanced = make_order(configured("train.batch_size=8", "data.balance=1"), data)
    indices = torch.cat([balanced.batch(step)[1] for step in range(9)])
    assert data.train.labels[indices].bincount().tolist() == [24, 24, 24]
    assert len(plain.batch(0)[1]) == len(balanced.batch(0)[1]) == 8


@pytest.mark.parametrize("balance", [0, 0.5])
def test_weights_are_those_of_what_is_drawn(balance):
    data = data_of(48, 9, 15)
    assert make_class_weights(configured(), data, CPU) is None
    config = configured("train.class_weights=balanced", f"data.balance={balance}")
    weights = make_class_weights(config, data, CPU)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, balanced_weights(training_sizes(data), balance).float())


def size_note(images, *overrides):
    config = configured(*overrides)
    return note_on_size(config, images, cost_of(config, 3, None))


def test_photos_that_are_made_as_small_as_a_thumbnail_are_told(tmp_path):
    # Most of them count, and neither a damaged one nor the longer sides do
    sizes = [(500, 375), (640, 480), (375, 500), (32, 32)]
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    (tmp_path / "4.png").write_bytes(b"no image")
    paths = np.array([os.fsencode(tmp_path / f"{number}.png") for number in range(5)])
    images = ImageSplit("photos", torch.zeros(5, dtype=torch.int64), paths=paths)
    line = size_note(images, "data=folder", "data.root=x")
    assert line == (
        "note   images of about 375 px are made 32 px small, in which little can be told apart; "
        "model=vit_s16 sees 224 px"
    )
    assert size_note(images, "data=folder", "data.root=x", "model=vit_s16") is None
    unreadable = ImageSplit("photos", torch.zeros(1, dtype=torch.int64), paths=paths[4:])
    assert size_note(unreadable, "data=folder", "data.root=x") is None


def test_small_images_that_are_enlarged_are_told_with_a_cheaper_setting():
    images = data_of(4, 4, 4).train
    assert size_note(images, "model.image_size=8", "model.patch_size=4").startswith(
        "note   images of 2 px are enlarged to 8; from scratch a model of their own size"
    )
    assert size_note(images, "model.image_size=4", "model.patch_size=4") is None
    enlarged = ("model.image_size=8", "model.patch_size=4")
    assert size_note(images, *enlarged, "pretrained=weights.npz") is None


@pytest.mark.parametrize(("workers", "advice"), [(4, "vit.shrink"), (1, "runtime.workers=4 ")])
def test_waiting_for_data_asks_for_no_more_workers_than_there_are_cores_for(
    tmp_path, monkeypatch, workers, advice
):
    """Four processes share sixteen cores."""
    monkeypatch.setattr("vit.runtime.cores.usable_cores", lambda: 16)
    processes = Processes(count=4, local_count=4)
    batches = MadeUpBatches(machine=Machine(CPU, processes, workers, sharded=False))
    batches.train = ImageSplit("files", torch.zeros(3), paths=[b"a", b"b", b"c"])
    observer = make_observer(tmp_path, make_state(), make_plan(6), batches)
    observer.clock.spent.data, observer.clock.spent.steps = 20, 80
    line = describe_bottleneck(configured(), observer, make_step(observer.state))
    assert "waiting for data" in line
    assert advice in line
