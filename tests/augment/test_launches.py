"""What augmenting a batch asks of a device: kernels, waits of the host, and the size of a copy."""

import collections
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
from composing import configured, files_of
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.emulated_device import EmulatedDevice, Emulation, Kernels, emulated_device, place
from vit.augment.affine import Affine
from vit.augment.batch import BatchAugmentation
from vit.augment.policies import POLICIES, build_policies
from vit.data.splits import ImageDataset, ImageSplit
from vit.runtime.machine import Machine
from vit.runtime.processes import Processes
from vit.runtime.signals import StopSignal
from vit.training.prepare import make_batches

BATCH_SIZE = 512
MOST_LAUNCHES = 250
MOST_BYTES = 1 << 16
AFFINE = Affine(rotate=30, translate=0.2, scale=0.3, shear=20)


@dataclass
class Launches:
    """What an emulated device was asked to do.

    kernels, waits: by what it was and the line of the project; copies: to the device, likewise,
    each with its size in bytes.
    """

    kernels: collections.Counter[str] = field(default_factory=collections.Counter)
    waits: collections.Counter[str] = field(default_factory=collections.Counter)
    copies: list[tuple[int, str]] = field(default_factory=list)

    @property
    def largest_copy(self) -> int:
        return max((size for size, _ in self.copies), default=0)


class KernelCounter(TorchDispatchMode):
    """Counts what is computed on an emulated device; a view of a tensor computes nothing."""

    def __init__(self, emulated: EmulatedDevice, launches: Launches):
        super().__init__()
        self.emulated = emulated
        self.launches = launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_view = func.is_view or func is torch.ops.aten._unsafe_view.default
        if not is_view and not Kernels.paused:
            values = tree_leaves((args, kwargs, result))
            tensors = [value for value in values if isinstance(value, Tensor)]
            if any(self.emulated.holds(tensor) for tensor in tensors):
                self.launches.kernels[f"{func} at {place()}"] += 1
        return result


class MakersCounter(TorchFunctionMode):
    """Has torch.arange(…, device=…) and its like counted: they have no operand on the device."""

    def __init__(self, emulated: EmulatedDevice):
        super().__init__()
        self.emulated = emulated

    def __torch_function__(self, func, types, args=(), kwargs=None):
        device = (kwargs or {}).get("device")
        made = device is not None and torch.device(device).type == self.emulated.kind
        self.emulated.calls += made
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.emulated.calls -= made


@contextlib.contextmanager
def counted_launches(emulated: EmulatedDevice) -> Iterator[Launches]:
    """Count within the block what the emulated device is asked to do."""
    launches = Launches()
    copy, note_copy = Emulation.copy, Emulation.note_copy

    def counted_copy(self, tensor, device, options):
        if device.type == emulated.kind and not emulated.holds(tensor):
            launches.copies.append((tensor.nbytes, place()))
        return copy(self, tensor, device, options)

    def counted_note(self, source, target, non_blocking):
        if isinstance(source, Tensor) and emulated.holds(target) and not emulated.holds(source):
            launches.copies.append((source.nbytes, place()))
        note_copy(self, source, target, non_blocking)

    waits_before = emulated.waits.copy()
    with (
        mock.patch.object(Emulation, "copy", counted_copy),
        mock.patch.object(Emulation, "note_copy", counted_note),
        MakersCounter(emulated),
        KernelCounter(emulated, launches),
    ):
        yield launches
    launches.waits.update(emulated.waits - waits_before)


def make_pixels(count, channels=3, side=32):
    generator = torch.Generator().manual_seed(3)
    shape = (count, channels, side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def step_launches(*overrides: str) -> Launches:
    """All that a step's batch of images in memory asks for, up to the model's input."""
    config = configured(
        "data=cifar10", "model.image_size=32", f"train.batch_size={BATCH_SIZE}", *overrides
    )
    count = 4 * BATCH_SIZE
    images = ImageSplit("images", torch.arange(count) % 10, make_pixels(count))
    data = ImageDataset([str(number) for number in range(10)], images, None, images)
    with emulated_device("cuda") as emulated:
        machine = Machine(emulated.device, Processes(), workers=0, sharded=False)
        batches = make_batches(config, data, machine, StopSignal()).training(0, 3)
        # Not the first, which may build what is kept
        next(batches)
        with counted_launches(emulated) as launches:
            next(batches)
    return launches


def augment(augmentation: BatchAugmentation, pixels: Tensor) -> Tensor:
    epochs = torch.zeros(len(pixels), dtype=torch.int64)
    return augmentation(pixels, epochs, torch.arange(len(pixels)))


def policy_augmentation(name: str, color_jitter: float = 0.0) -> BatchAugmentation:
    """A policy alone, or with the color jitter."""
    policies = build_policies(name, None, None, color_jitter)
    return BatchAugmentation(0, (32, 32), 0.0, None, 0.0, policies)


def augmentation_launches(augmentation: BatchAugmentation) -> Launches:
    """What a batch's augmentation alone asks for."""
    with emulated_device("cuda") as emulated:
        pixels = make_pixels(BATCH_SIZE).to("cuda")
        with counted_launches(emulated) as launches:
            assert emulated.holds(augment(augmentation, pixels))
    return launches


def check(launches: Launches) -> None:
    assert not launches.waits
    assert 0 < launches.kernels.total() <= MOST_LAUNCHES, launches.kernels.most_common(20)
    assert launches.largest_copy <= MOST_BYTES, max(launches.copies)


@pytest.mark.parametrize("name", files_of("augment"))
def test_a_steps_images_take_few_launches_no_wait_and_small_copies(name):
    check(step_launches(f"augment={name}"))


@pytest.mark.parametrize("name", ["none", *POLICIES])
def test_policies_take_few_launches_and_no_wait(name):
    check(augmentation_launches(policy_augmentation(name, color_jitter=0.3)))


@pytest.mark.parametrize("crop_scale", [None, [0.08, 1.0]])
def test_affine_changes_take_few_launches_and_no_wait(crop_scale):
    check(augmentation_launches(BatchAugmentation(0, (32, 32), 0.0, crop_scale, 0.5, (), AFFINE)))


@pytest.mark.parametrize("size", ["model.image_size=16", "data.interpolation=bicubic"])
@pytest.mark.parametrize("change", ["augment.crop_scale=[0.3,1]", "augment.rotate=10"])
def test_resizing_with_antialiasing_takes_few_launches_and_no_wait(change, size):
    check(step_launches("augment=none", change, size))


@pytest.mark.parametrize("kind", ["mps", "cuda"])
@pytest.mark.parametrize(("size", "interpolation"), [((16, 16), "bilinear"), ((48, 48), "bicubic")])
def test_a_device_resizes_to_the_cpus_pixels(kind, size, interpolation):
    pixels = make_pixels(40)
    for crop_scale in (None, [0.08, 1.0]):
        augmentation = BatchAugmentation(0, size, 0.0, crop_scale, 0.5, (), AFFINE, interpolation)
        expected = augment(augmentation, pixels)
        with emulated_device(kind) as emulated:
            out = augment(augmentation, pixels.to(kind))
            assert emulated.holds(out)
        assert torch.equal(out, expected)


def test_launches_do_not_grow_with_the_batch(monkeypatch):
    """Images that share an operation share its kernels, whatever their strengths."""
    augmentation = policy_augmentation("randaugment_timm", color_jitter=0.3)
    whole = augmentation_launches(augmentation).kernels.total()
    monkeypatch.setitem(globals(), "BATCH_SIZE", 2 * BATCH_SIZE)
    assert augmentation_launches(augmentation).kernels.total() == whole


@pytest.mark.parametrize("kind", ["mps", "cuda"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_device_gives_the_cpus_pixels(name, kind):
    """It lacks nothing that is needed there: no type, no kernel, no operand left on the CPU."""
    policies = build_policies(name, None, None, 0.3)
    pixels = make_pixels(40)
    for pad, crop_scale in ((0.125, None), (0.0, [0.08, 1.0])):
        augmentation = BatchAugmentation(0, (32, 32), pad, crop_scale, 0.5, policies, AFFINE)
        expected = augment(augmentation, pixels)
        with emulated_device(kind) as emulated:
            out = augment(augmentation, pixels.to(kind))
            assert emulated.holds(out)
        assert torch.equal(out, expected)


def test_what_is_too_much_is_noticed():
    """A wait, a large copy, a kernel; views are no kernels."""
    with emulated_device("cuda") as emulated:
        pixels = make_pixels(8).to("cuda")
        with counted_launches(emulated) as launches:
            pixels.flatten(1)[:, None].expand(-1, 2, -1).unbind(1)
            assert not launches.kernels
            torch.arange(3, device="cuda")
            pixels.add(1).mul_(2)
            assert launches.kernels.total() == 3
            assert not launches.copies
            make_pixels(8).to("cuda", non_blocking=True)
            assert launches.largest_copy == 8 * 3 * 32 * 32
            assert not emulated.waits - collections.Counter({"copy to cuda at ?": 1})
            pixels.max().item()
    assert launches.waits.total() == 1
