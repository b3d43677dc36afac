import pytest
import torch

from vit.augment.erasing import random_erase


def test_erasing_fills_a_box_with_noise():
    images = torch.zeros(2000, 3, 32, 32)
    epochs, indices = torch.zeros(2000, dtype=torch.int64), torch.arange(2000)
    out = random_erase(images, epochs, indices, seed=0, probability=0.25)
    erased = (out != 0).any(1)
    touched = erased.flatten(1).any(1)
    assert touched.float().mean() == pytest.approx(0.25, abs=0.03)
    for mask in erased[touched][:50]:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        height = int(rows.max() - rows.min()) + 1
        width = int(columns.max() - columns.min()) + 1
        assert mask.sum() == height * width  # one box, whole
        assert 0.01 < height * width / 1024 < 0.37
        assert 0.2 < height / width < 5
    noise = out[touched][erased[touched][:, None].expand(-1, 3, -1, -1)]
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert torch.equal(random_erase(images[:7], epochs[:7], indices[:7], 0, 0.25), out[:7])
