import pytest
import torch
from torchvision.transforms.v2.functional import _geometry


@pytest.fixture
def plain_grids(monkeypatch):
    """Have torchvision's batches sampled where multiplications and additions say.

    Its own matrix product rounds as the CPU's library likes, so that one nearest neighbor or
    another is taken where two are equally near.
    """
    product = _geometry._affine_grid

    def plain(theta, w, h, ow, oh):
        rows = theta / torch.tensor([0.5 * w, 0.5 * h])[:, None]
        x = torch.arange(ow) - (ow - 1) * 0.5
        y = torch.arange(oh)[:, None] - (oh - 1) * 0.5
        grid = torch.stack([x * a + y * b + c for a, b, c in rows[0]], dim=-1)[None]
        torch.testing.assert_close(grid, product(theta, w, h, ow, oh), atol=1e-6, rtol=0)
        return grid

    monkeypatch.setattr(_geometry, "_affine_grid", plain)
