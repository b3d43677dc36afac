import contextlib
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, make_images
from PIL import Image

from benchmarks.emulated_device import emulated_device
from vit.augment.policies import build_policies
from vit.data.class_folders import list_class_folders
from vit.data.loader import (
    ImageFileDataset,
    copy_ahead,
    decode_batches,
    evaluation_batches,
    evaluation_pixels,
)
from vit.data.preprocessing import Preprocessing
from vit.data.sample_order import SampleOrder
from vit.data.splits import ImageSplit
from vit.data.training_transform import TrainingTransform
from vit.errors import DataError
from vit.runtime.device import send

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing((24, 24), 3, (0.5,), (0.25,), 0.875, "bilinear")


def list_images(root, count=12):
    make_images(root, {"train": count})
    return list_class_folders(root / "train", "images")[1]


def steps(images, first, last, batch_size=8):
    """The (epoch, index) pairs of each batch."""
    order = SampleOrder(len(images), batch_size, seed=5)
    for step in range(first, last):
        passes, indices = order.batch(step)
        yield list(zip(passes.tolist(), indices.tolist(), strict=True))


def decode(images, workers, first=0, last=4, device=CPU):
    policies = build_policies("randaugment", 2, 9, 0.3)
    transform = TrainingTransform(PREPROCESSING, [0.2, 1.0], 0.5, policies)
    dataset = ImageFileDataset(images, PREPROCESSING, transform, seed=5)
    return list(decode_batches(dataset, steps(images, first, last), workers, device))


def test_any_number_of_workers_gives_the_same_batches(tmp_path):
    images = list_images(tmp_path)
    expected = decode(images, 0)
    assert expected[0][0].shape == (8, 3, 24, 24)
    assert expected[0][0].dtype == torch.uint8
    for workers in (1, 2):
        for batch, known in zip(decode(images, workers), expected, strict=True):
            assert torch.equal(batch[0], known[0])
            assert torch.equal(batch[1], known[1])
    resumed = decode(images, 1, first=2)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(resumed, expected[2:], strict=True))


def test_an_image_is_augmented_differently_in_another_epoch(tmp_path):
    images = list_images(tmp_path)
    transform = TrainingTransform(PREPROCESSING, [0.2, 1.0], 0.5)
    dataset = ImageFileDataset(images, PREPROCESSING, transform, seed=5)
    assert torch.equal(dataset[0, 3][0], dataset[0, 3][0])
    assert not torch.equal(dataset[0, 3][0], dataset[1, 3][0])
    other_seed = ImageFileDataset(images, PREPROCESSING, transform, seed=6)
    assert not torch.equal(dataset[0, 3][0], other_seed[0, 3][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(tmp_path, workers):
    images = list_images(tmp_path)
    (tmp_path / "train" / "cat" / "3.jpg").write_bytes(b"\xff\xd8 no more")
    with pytest.raises(DataError, match=r"^\S*train/cat/3\.jpg: not a readable image"):
        decode(images, workers, last=6)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_can_be_replaced_by_another(tmp_path, workers, caplog):
    caplog.set_level(logging.INFO, logger="vit")
    images = list_images(tmp_path)
    dataset = ImageFileDataset(images, PREPROCESSING, None, seed=5, skip=True)
    (batch,) = steps(images, 0, 1, batch_size=len(images))
    order = [index for _, index in batch]

    def decode_epoch():
        (decoded,) = decode_batches(dataset, [batch], workers, CPU)
        return decoded

    whole, _ = decode_epoch()
    bad = order[3]
    Path(os.fsdecode(images.paths[bad])).write_bytes(b"\xff\xd8 no more")
    pixels, labels = decode_epoch()
    substitute = (bad + 1) % len(images)
    assert torch.equal(pixels[3], whole[order.index(substitute)])
    assert labels[3] == images.labels[substitute]
    others = [position for position in range(len(order)) if position != 3]
    assert torch.equal(pixels[others], whole[others])
    (line,) = [record.message for record in caplog.records]
    assert line.startswith(f"warning: skipped {os.fsdecode(images.paths[bad])}: ")

    Path(os.fsdecode(images.paths[order[7]])).write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 24 images cannot be read, more than 1%"):
        decode_epoch()


def test_many_unreadable_images_in_a_row_are_no_accident(tmp_path):
    images = list_images(tmp_path)
    for path in images.paths[:10]:
        Path(os.fsdecode(path)).write_bytes(b"")
    dataset = ImageFileDataset(images, PREPROCESSING, None, seed=0, skip=True)
    assert isinstance(dataset[0, 0], DataError)
    pixels, _, unreadable = dataset[0, 1]
    assert torch.equal(pixels, dataset[0, 10][0])
    assert len(unreadable) == 9


def test_evaluation_sees_every_image_once_in_order(tmp_path):
    images = list_images(tmp_path, count=5)
    batches = list(evaluation_batches(images, 4, PREPROCESSING, 1, CPU))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([labels for _, labels in batches]), images.labels)
    inputs = torch.cat([inputs for inputs, _ in batches])
    expected = PREPROCESSING(Image.open(os.fsdecode(images.paths[7])))
    torch.testing.assert_close(inputs[7], expected)


@pytest.mark.parametrize(("count", "processes"), [(23, 1), (23, 2), (23, 4), (3, 4), (24, 4)])
def test_evaluation_is_shared_by_processes(count, processes):
    pixels = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    images = ImageSplit("numbers", torch.arange(count) + 100, pixels)
    seen, lengths = [], []
    for rank in range(processes):
        batches = list(evaluation_pixels(images, 5, PREPROCESSING, 0, CPU, rank, processes))
        lengths.append([len(labels) for _, labels in batches])
        numbers = torch.cat([pixels for pixels, _ in batches]).flatten().long()
        labels = torch.cat([labels for _, labels in batches])
        counted = labels != -1
        assert torch.equal(labels[counted], numbers[counted] + 100)
        seen += numbers[counted].tolist()
    assert sorted(seen) == list(range(count))
    # Or some processes would wait for the others for ever
    assert all(length == lengths[0] for length in lengths)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_workers_leave_signals_to_their_parent(tmp_path, number):
    images = list_images(tmp_path)
    dataset = ImageFileDataset(images, PREPROCESSING, None, seed=0)
    before = multiprocessing.active_children()
    stream = decode_batches(dataset, ([(epoch, 0)] for epoch in range(1000)), 2, CPU)
    first, _ = next(stream)
    next(stream)  # of the second worker, which now answers no signals either
    workers = set(multiprocessing.active_children()) - set(before)
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, number)
    for _ in range(20):
        assert torch.equal(next(stream)[0], first)
    assert all(worker.is_alive() for worker in workers)
    stream.close()


class NotedStream:
    """Stands in for a stream of the device: notes what is queued in which order."""

    def __init__(self, name, events):
        self.name = name
        self.events = events

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")


@contextlib.contextmanager
def noted_streams(monkeypatch):
    """The order of copies, waits and steps on an emulated GPU; yields their list."""
    events = []
    step, copying = (NotedStream(name, events) for name in ("step", "copies"))
    current = [step]

    @contextlib.contextmanager
    def switched(stream):
        current.append(stream)
        yield
        current.pop()

    def noted_send(tensor, device):
        if tensor.ndim > 1:
            events.append(f"{current[-1].name}: copy {int(tensor[0, 0])}")
        return send(tensor, device)

    with emulated_device("cuda"):
        monkeypatch.setattr("torch.cuda.Stream", lambda device: copying)
        monkeypatch.setattr("torch.cuda.current_stream", lambda device: current[-1])
        monkeypatch.setattr("torch.cuda.stream", switched)
        monkeypatch.setattr("vit.data.loader.send", noted_send)
        yield events


def test_a_batch_is_copied_while_the_step_before_it_computes(monkeypatch):
    batches = [(torch.full((2, 3), number), torch.tensor([number])) for number in range(3)]
    with noted_streams(monkeypatch) as events:
        seen = []
        for pixels, labels in copy_ahead(iter(batches), torch.device("cuda")):
            assert pixels.is_cuda
            assert labels.is_cuda
            seen.append((pixels.cpu(), labels.cpu()))
            events.append(f"step {int(labels.cpu())}")
    for batch, known in zip(seen, batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, known, strict=True))
    assert events == [
        "copies: copy 0",
        # Each copy is queued before the step that it runs beside, which does not wait for it
        "step waits for copies",
        "copies: copy 1",
        "step 0",
        "step waits for copies",
        "copies: copy 2",
        "step 1",
        "step waits for copies",
        "step 2",
    ]


@pytest.mark.parametrize("count", [0, 1])
def test_few_batches_are_copied_too(monkeypatch, count):
    batches = [(torch.full((2, 3), number), torch.tensor([number])) for number in range(count)]
    with noted_streams(monkeypatch):
        assert len(list(copy_ahead(batches, torch.device("cuda")))) == count


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_a_gpu_gets_the_same_batches(tmp_path):
    images = list_images(tmp_path)
    expected = decode(images, 0)
    with emulated_device("cuda") as emulated:
        device = torch.device("cuda")
        batches = decode(images, 0, device=device)
        assert not emulated.waits
        assert all(emulated.holds(tensor) for batch in batches for tensor in batch)
    for batch, known in zip(batches, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, known, strict=True))


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_closing_early_ends_the_workers(tmp_path, kind):
    images = list_images(tmp_path)
    dataset = ImageFileDataset(images, PREPROCESSING, None, seed=0)
    before = set(multiprocessing.active_children())
    with emulated_device("cuda"):
        items = ([(epoch, 0)] for epoch in range(1000))
        stream = decode_batches(dataset, items, 2, torch.device(kind))
        next(stream)
        assert len(set(multiprocessing.active_children()) - before) == 2
        stream.close()
    assert not set(multiprocessing.active_children()) - before


@pytest.mark.parametrize(("kind", "pinned"), [("cpu", False), ("cuda", True)])
def test_memory_is_pinned_for_a_gpu(tmp_path, monkeypatch, kind, pinned):
    settings = []
    monkeypatch.setattr(
        "vit.data.loader.DataLoader", lambda *_, **given: settings.append(given) or iter([])
    )
    dataset = ImageFileDataset(list_images(tmp_path), PREPROCESSING, None, seed=0)
    decode_batches(dataset, [], 0, torch.device(kind))
    assert settings[0]["pin_memory"] == pinned


def test_workers_touch_no_gpu(tmp_path, monkeypatch):
    """A process that was forked after CUDA's start cannot use it: any use raises there."""
    images = list_images(tmp_path)

    def refuse(*arguments):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    with emulated_device("cuda") as emulated:
        PREPROCESSING.to_input(torch.zeros(1, 3, 24, 24, dtype=torch.uint8).to("cuda"))
        for name in ("_lazy_init", "manual_seed_all", "current_device", "synchronize"):
            monkeypatch.setattr(f"torch.cuda.{name}", refuse)
        emulated.kernels.clear()
        decode(images, workers=0, last=1)
        assert not emulated.kernels
    # In a real worker too
    assert len(decode(images, workers=1, last=2)) == 2


def test_nothing_forks_but_the_loader():
    forks = re.compile(
        r"os\.fork|multiprocessing\.(Process|Pool|get_context|set_start_method)|ProcessPoolExecutor"
        r"|torch\.multiprocessing|mp\.spawn"
    )
    files = [ROOT / "train.py", ROOT / "evaluate.py", *(ROOT / "vit").rglob("*.py")]
    # Of making images smaller and writing shards, which need no GPU
    assert [path.name for path in files if forks.search(path.read_text())] == ["process_pool.py"]
    loaders = [path.name for path in files if "DataLoader(" in path.read_text()]
    assert sorted(loaders) == ["image_stream.py", "loader.py"]


SCRIPT = """
import sys
from pathlib import Path
import torch
from vit.data.class_folders import list_class_folders
from vit.data.loader import ImageFileDataset, decode_batches
from vit.data.preprocessing import Preprocessing

images = list_class_folders(Path(sys.argv[1]) / "train", "images")[1]
preprocessing = Preprocessing((24, 24), 3, (0.5,), (0.25,), None, "bilinear")
dataset = ImageFileDataset(images, preprocessing, None, 0)
stream = decode_batches(dataset, ([(epoch, 0)] for epoch in range(1000)), 2, torch.device("cpu"))
next(stream)
raise RuntimeError("planted")
"""


def test_a_program_that_ends_in_an_error_does_not_wait_for_its_workers(tmp_path):
    list_images(tmp_path)
    program = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert program.returncode == 1
    assert program.stderr.rstrip().endswith("RuntimeError: planted")
    assert "killed by signal" not in program.stderr


SMALL_SHARED_MEMORY = """
import resource, signal, sys
from pathlib import Path
import torch
from vit.data import image_stream, loader
from vit.data.class_folders import list_class_folders
from vit.data.preprocessing import Preprocessing
from vit.runtime.faults import describe_fault

def init_worker(worker):
    # Shared memory is a file too; more than this is refused, as where there is no room for it
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

loader.init_worker = image_stream.init_worker = init_worker
preprocessing = Preprocessing((100, 100), 3, (0.5,), (0.25,), 0.875, "bilinear")
images = list_class_folders(Path("train"), "images")[1]
if sys.argv[1] == "split":
    dataset = loader.ImageFileDataset(images, preprocessing, None, seed=5)
    batches = loader.decode_batches(dataset, [[(0, i) for i in range(8)]], 1, torch.device("cpu"))
else:
    batches = image_stream.stream_batches(iter(["train/cat/0.jpg"] * 8), preprocessing, 8, 1)
try:
    list(batches)
except RuntimeError as error:
    print(describe_fault(error, None))
"""


@pytest.mark.parametrize("source", ["split", "stream"])
def test_too_little_shared_memory_is_an_error_and_no_silence(tmp_path, source):
    list_images(tmp_path)
    (tmp_path / "small.py").write_text(SMALL_SHARED_MEMORY)
    done = subprocess.run(
        [sys.executable, "small.py", source],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.startswith("too little shared memory"), done.stderr
