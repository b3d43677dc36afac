import torch
from PIL import Image

from vit.augment.batch import BatchAugmentation
from vit.augment.flips import AlternatingFlip
from vit.data.datasets import ImageSplit
from vit.data.loader import ImageFileDataset
from vit.data.preprocessing import Preprocessing
from vit.data.sample_order import SampleOrder
from vit.data.training_transform import TrainingTransform

FLIP = AlternatingFlip(seed=3)


def test_any_two_passes_in_a_row_show_both_sides():
    indices = torch.arange(1000)
    passes = [FLIP(torch.full_like(indices, number), indices) for number in range(4)]
    assert torch.equal(passes[0], ~passes[1])
    assert torch.equal(passes[0], passes[2])
    assert torch.equal(passes[1], passes[3])
    # Half of the images begin mirrored, others with another seed
    assert 400 < passes[0].sum() < 600
    assert 400 < (passes[0] == AlternatingFlip(4)(indices * 0, indices)).sum() < 600


def test_repeated_copies_of_an_image_alternate():
    passes, indices = SampleOrder(8, 32, seed=0, repeats=2).batch(0)
    flipped = FLIP(passes, indices)
    for image in range(8):
        assert flipped[indices == image].sum() == 2  # of two copies in each of two epochs


def test_a_batch_in_memory_is_mirrored_in_turn():
    images = torch.arange(6 * 8, dtype=torch.uint8).reshape(6, 1, 1, 8)
    augmentation = BatchAugmentation(3, (1, 8), 0.0, None, FLIP)
    indices = torch.arange(6)
    for epoch in (0, 1):
        passes = torch.full_like(indices, epoch)
        out = augmentation(images, passes, indices)
        for image, result, flipped in zip(images, out, FLIP(passes, indices), strict=True):
            assert torch.equal(result, image.flip(-1) if flipped else image)


def test_an_image_file_is_mirrored_in_the_same_turn(tmp_path):
    Image.linear_gradient("L").rotate(90).save(tmp_path / "0.png")
    paths = [str(tmp_path / "0.png").encode()] * 6
    images = ImageSplit("x", torch.zeros(6, dtype=torch.int64), paths=paths)
    preprocessing = Preprocessing((16, 16), 1, [0.5], [0.5], 1.0, "bilinear")
    plain = preprocessing.read_pixels(tmp_path / "0.png")
    dataset = ImageFileDataset(
        images, preprocessing, TrainingTransform(preprocessing, None, FLIP), seed=3
    )
    for epoch in (0, 1):
        for index in range(6):
            item = dataset[epoch, index]
            flipped = FLIP(torch.tensor(epoch), torch.tensor(index))
            assert torch.equal(item[0], plain.flip(-1) if flipped else plain)
