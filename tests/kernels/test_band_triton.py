"""Softmax over a band's rows and its gradient: on a GPU, and on any CPU through Triton's interpreter."""

import pytest
import torch

from megaboat.kernels import band as band_module
from megaboat.kernels.band import Band
from tests.kernels.test_attention import SCALE, borders
from tests.kernels.test_band import CASES
from tests.kernels.test_ema_triton import DEVICES

band_triton = pytest.importorskip("megaboat.kernels.band_triton", reason="triton is not installed")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("lengths", "window"), CASES, ids=str)
def test_softmax_both_ways(lengths: tuple[int, ...], window: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(band_triton, "COLUMNS", 32)  # several pieces to a row
    cu, band = borders(*lengths), Band(sum(lengths), window, 16)
    q_RZ, k_RZ = torch.randn(band.R, 8), torch.randn(band.R, 8)
    given_RC, v_RC = torch.randn(band.R, 12), torch.randn(band.R, 12)
    weights = band_module._weights(band, q_RZ, k_RZ, cu, SCALE)
    scores, products = (band_module._products(band, a, b).to(device) for a, b in ((q_RZ, k_RZ), (given_RC, v_RC)))
    mine = band_triton.band_softmax_triton(scores, band, cu.to(device), SCALE, torch.float32)
    assert_tiles_agree(band, mine, weights)
    band_triton.band_softmax_backward_triton(mine, products, band, SCALE)
    assert_tiles_agree(band, mine, band_module._softmax_backward(band, weights, products.cpu(), SCALE))


def assert_tiles_agree(band: Band, mine: torch.Tensor, truth: torch.Tensor) -> None:
    """In all that a product reads: zeros too must have been written, into buffers that began as NaN."""
    for tile in [*band.by_query(), *band.by_key()]:
        if tile.queries and tile.keys:
            torch.testing.assert_close(band.tile(mine, tile).cpu(), band.tile(truth, tile), rtol=1e-5, atol=1e-6)
