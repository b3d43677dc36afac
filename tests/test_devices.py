"""The whole program on devices that this machine does not have, played by the CPU.

Apple's GPU has no float64 and lacks kernels; on both an operand on the wrong device ends the run.
"""

import contextlib
import importlib
import io
import shutil
from collections.abc import Iterator

import pytest
import torch
from helpers import make_images, read_result, rows
from observed_runs import compose_script, train

import evaluate as evaluate_script
from benchmarks.emulated_device import EmulatedDevice, emulated_device, kernels_of
from vit.config.config import from_composed
from vit.config.resume import command_line_changes

# Two epochs of 80 digits with every kind of augmentation, averaged weights and an attention map
RUN = (
    "model=vit_ti4",
    "model.image_size=8",
    "model.hidden_size=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.drop_path=0.2",
    "model.dropout=0.1",
    "data=digits",
    "data.limit=80",
    "augment.rotate=10",
    "augment.erasing=0.5",
    "augment.mixup=0.5",
    "augment.cutmix=1",
    "train.batch_size=16",
    "train.micro_batch_size=12",
    "train.epochs=2",
    "train.log_every=3",
    "train.attention_every=2",
    "train.precision=fp32",
    "runtime.workers=0",
    "runtime.threads=1",
)
# Torch's generator is another one on each device: what it draws differs
SAME_EVERYWHERE = (*RUN, "model.dropout=0")


@pytest.fixture(autouse=True)
def no_product_is_measured(monkeypatch):
    """One of a GPU's size would take this machine minutes."""
    monkeypatch.setattr("vit.training.start.product_rate", lambda *arguments: 1e12)


@pytest.fixture(params=["mps", "cuda"])
def device(request) -> Iterator[EmulatedDevice]:
    with emulated_device(request.param) as emulated:
        yield emulated


def call(command: str, *arguments: object) -> None:
    """`python -m vit.COMMAND arguments…`, which must end well."""
    main = importlib.import_module(f"vit.{command}").main
    assert main([str(argument) for argument in arguments]) in (0, None)


def evaluate(*overrides: str) -> None:
    composed = compose_script("evaluate", list(overrides))
    changes = command_line_changes(composed, list(overrides))
    evaluate_script.measure(from_composed(composed), changes)


@pytest.mark.slow
def test_training_resuming_evaluating_and_looking_inside(device, tmp_path):
    folder = tmp_path / "run"
    train(folder, list(RUN))
    assert read_result(folder)["status"] == "finished"
    # The model was really there
    assert device.kernels["native_layer_norm"] > 100

    # Elsewhere, since this process still holds the lock of the folder
    resumed = shutil.copytree(folder, tmp_path / "resumed", ignore=shutil.ignore_patterns(".lock"))
    train(resumed, [f"resume={resumed}", "train.epochs=3", "resume_changed=allow"])
    assert read_result(resumed)["steps"] == 15

    # A teacher of smaller images, of which it is shown enlarged ones
    best = folder / "checkpoints" / "best.safetensors"
    taught = (f"train.teacher={best}", "train.distillation=soft", "model.distill_token=true")
    train(tmp_path / "student", [*RUN, *taught, "model.image_size=12", "data.mean=[0.3]"])
    assert read_result(tmp_path / "student")["status"] == "finished"

    numbers = ("report=true", "knn=true", "corruptions=true", "batch_size=7")
    evaluate(f"checkpoint='{best}'", *numbers)
    assert list(folder.rglob("index.html"))
    evaluate(f"pretrained='{best}'", "data=digits", "split=val", f"out='{tmp_path}/out'")

    make_images(tmp_path / "images", {"x": 3})
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        maps = ("--attention", tmp_path / "maps")
        call("predict", best, tmp_path / "images", *maps, "--workers", 0)
        page = ("--similar", tmp_path / "similar.html")
        call("embed", best, tmp_path / "images", "--out", tmp_path / "f.npz", *page)
        call("prune", best, "--fraction", 0.5, "--out", tmp_path / "pruned.safetensors")
        call("explore", best, "--limit", 2, "--out", tmp_path / "explorer.html")
    assert len(list((tmp_path / "maps").rglob("*.png"))) == 6
    assert "explorer.html" in printed.getvalue()
    assert (tmp_path / "pruned.safetensors").exists()


def test_other_optimizers_and_precisions(device, tmp_path):
    """Muon and LAMB, bf16, image files instead of images in memory, and hybrids."""
    if "native_group_norm_backward" not in kernels_of(device.kind):
        pytest.skip(f"torch {torch.__version__} has no gradient of GroupNorm there, for hybrids")
    muon = ("optimizer=muon", "model.conv_stem=[16,16]", "train.whiten_patches=true")
    train(tmp_path / "muon", [*RUN, *muon, "train.precision=bf16", "train.steps=2"])
    lamb = ("optimizer=lamb", "train.loss=bce", "augment=strong", "train.steps=2")
    train(tmp_path / "lamb", [*RUN, *lamb])
    make_images(tmp_path / "images", {"train": 40, "test": 8}, ("cat", "dog"))
    files = ("data=folder", f"data.root={tmp_path}/images", "augment=deit3", "data.limit=null")
    hybrid = ("model.image_size=16", "model.patch_size=8", "model.resnet_stages=[1]")
    train(tmp_path / "files", [*RUN, *files, *hybrid, "train.steps=2"])
    for name in ("muon", "lamb", "files"):
        assert read_result(tmp_path / name)["status"] == "finished"


def test_the_numbers_are_those_of_the_cpu(device, tmp_path):
    train(tmp_path / "device", list(SAME_EVERYWHERE))
    train(tmp_path / "cpu", [*SAME_EVERYWHERE, "runtime.device=cpu"])
    ours, theirs = (rows(tmp_path / name / "metrics.jsonl") for name in ("device", "cpu"))
    assert len(ours) == len(theirs) > 5
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_tensor_left_on_the_cpu_ends_the_run(device, tmp_path, monkeypatch):
    """The test above would notice."""
    monkeypatch.setattr("vit.training.step.send", lambda tensor, device: tensor)
    with pytest.raises(RuntimeError, match="same device"):
        train(tmp_path / "run", list(RUN))


def test_numbers_of_64_bits_end_the_run_on_apples_gpu(tmp_path, monkeypatch):
    def in_float64(self, images, *others):
        return images.sum(dtype=torch.float64)

    monkeypatch.setattr("vit.model.vision_transformer.VisionTransformer.forward", in_float64)
    with emulated_device("mps"), pytest.raises(TypeError, match="float64"):
        train(tmp_path / "run", list(RUN))
