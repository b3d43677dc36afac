"""Images per second that reach a GPU from JPEGs: decoded by the cores, and by the GPU itself.

    python benchmarks/gpu_input.py --jpegs FOLDER_OF_JPEGS --out table.md
    python benchmarks/gpu_input.py --miniature     # few images, on whatever is there

A piece of benchmarks/gpu.py. Without a folder smooth noise of 500 x 375 px is taken, which is
decoded as fast as photographs of that size. Both ways end in normalized batches of 224 px on the
device, randomly cropped and mirrored. The GPU decodes whole images by nvJPEG (torchvision), and
crops and resizes them there, one by one.
"""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as transforms

# The script is started by its path, and the repository is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.input import MEAN, STD, make_augmentation
from benchmarks.reporting import Report, table_header, table_row
from benchmarks.timing import describe_machine, synchronize
from vit.augment.image import draw_crop
from vit.data.class_folders import list_class_folders
from vit.data.image_files import find_image_files
from vit.data.preprocessing import Preprocessing
from vit.data.sample_order import SampleOrder
from vit.data.splits import ImageDataset, ImageSplit
from vit.runtime.cores import loader_workers
from vit.runtime.device import choose_device
from vit.runtime.machine import Machine
from vit.runtime.processes import Processes
from vit.runtime.signals import StopSignal
from vit.training.batches import Batches

PREPROCESSING = Preprocessing((224, 224), 3, MEAN, STD, 0.875, "bilinear")
BATCH_SIZE, BATCHES = 256, 40
MINIATURE_BATCH_SIZE, MINIATURE_BATCHES = 4, 3
CROP_SCALE = [0.08, 1.0]


def made_up_jpeg(number: int) -> bytes:
    """Return smooth noise of 500 x 375 px as a JPEG of about 40 kB."""
    generator = torch.Generator().manual_seed(number)
    small = torch.rand(1, 3, 24, 32, generator=generator)
    pixels = F.interpolate(small, (375, 500), mode="bicubic").clamp(0, 1)
    grain = torch.rand(1, 3, 375, 500, generator=generator)
    pixels = (0.9 * pixels + 0.1 * grain).mul(255).to(torch.uint8)[0]
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
    return file.getvalue()


def fill_folder(root: Path, source: Path | None, count: int) -> None:
    """Fill root/train with `count` JPEGs in two classes, repeated where there are fewer."""
    if source is not None:
        files = [path.read_bytes() for path in find_image_files([source])[:512]]
    else:
        files = [made_up_jpeg(number) for number in range(min(count, 64))]
    for number in range(count):
        folder = root / "train" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(files[number % len(files)])


def make_batches(
    images: ImageSplit, device: torch.device, workers: int, batch_size: int
) -> Batches:
    """Return the batches that training reads."""
    return Batches(
        data=ImageDataset([], train=images, val=None, test=images),
        preprocessing=PREPROCESSING,
        augmentation=make_augmentation(
            PREPROCESSING, crop_scale=CROP_SCALE, pad=0.0, policy="none"
        ),
        order=SampleOrder(len(images), batch_size, seed=0),
        batch_size=batch_size,
        machine=Machine(device, Processes(), workers, sharded=False),
        stop=StopSignal(),
    )


def decoded_by_the_gpu(paths: list[Path], device: torch.device, size: int) -> Iterator[Tensor]:
    """Yield batches of `size` images whose files are decoded by nvJPEG."""
    height, width = PREPROCESSING.image_size
    for start in range(0, len(paths) - size + 1, size):
        files = [
            torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            for path in paths[start : start + size]
        ]
        images = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
        cropped = []
        for image in images:
            crop = draw_crop(*image.shape[-2:], CROP_SCALE)
            box = (crop.top, crop.left, crop.height, crop.width)
            piece = transforms.resized_crop(image, *box, [height, width], antialias=True)
            cropped.append(piece.flip(-1) if torch.rand(()) < 0.5 else piece)
        yield PREPROCESSING.to_input(torch.stack(cropped))


def rate(batches: Iterator[object], size: int, device: torch.device, workers: int = 1) -> float:
    """Return the images/s of batches of `size` images, made by so many workers at once.

    The first of each worker is left out.
    """
    # Starting processes and libraries is not counted, nor are the batches that the other workers
    # have made while the first one was waited for
    for _ in range(workers):
        next(batches)
    synchronize(device)
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    synchronize(device)
    return count * size / (time.perf_counter() - start)


def measure(root: Path, device: torch.device, size: int, batches: int) -> Iterator[str]:
    """Yield the table's rows."""
    _, images = list_class_folders(root / "train", "JPEGs")
    most = loader_workers(None, device_type="cuda")
    for workers in sorted({1, max(1, most // 2), most}):
        # As many of each worker, at least three: a rest would be made by a few of them
        count = workers * max(3, -(-batches // workers))
        training = make_batches(images, device, workers, size).training(0, count)
        yield table_row(f"{workers} workers", f"{rate(training, size, device, workers):,.0f}")

    title = "the GPU (nvJPEG)"
    if device.type != "cuda":
        yield table_row(title, "no GPU")
        return
    paths = sorted((root / "train").rglob("*.jpg"))
    try:
        on_gpu = decoded_by_the_gpu(paths, device, size)
        yield table_row(title, f"{rate(on_gpu, size, device):,.0f}")
    except RuntimeError as error:
        # torchvision may be built without it
        yield table_row(title, str(error).splitlines()[0][:80])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jpegs", type=Path, help="a folder of JPEGs of their original sizes")
    parser.add_argument("--miniature", action="store_true", help="few images, to try the script")
    parser.add_argument("--out", type=Path, help="write the table here too, as Markdown")
    arguments = parser.parse_args()
    device = choose_device("auto")
    size, batches = BATCH_SIZE, BATCHES
    if arguments.miniature:
        size, batches = MINIATURE_BATCH_SIZE, MINIATURE_BATCHES

    report = Report(arguments.out)
    report.add(describe_machine(device), "")
    report.add(table_header("JPEGs to 224 px on the device, decoded by", "images/s"))
    with tempfile.TemporaryDirectory() as folder:
        fill_folder(Path(folder), arguments.jpegs, size * batches)
        for row in measure(Path(folder), device, size, batches):
            report.add(row)


if __name__ == "__main__":
    main()
