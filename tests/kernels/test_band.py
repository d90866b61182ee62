"""Attention by products of a band against the dense reference: sizes around the blocks, documents, heads."""

import functools

import pytest
import torch
from torch import Tensor

from megaboat.kernels import attention, flash, reference
from megaboat.kernels.band import Band, band_attention
from tests.kernels.checks import DEVICES, assert_as_exact_as_torch, error, outputs_and_gradients
from tests.kernels.test_attention import SCALE, attention_inputs, borders

CASES = [  # documents, window; blocks of 16 rows
    ((1,), 0),
    ((5, 0, 30, 1, 13), 3),
    ((100, 30), 20),
    ((200,), 16),
    ((1, 199), 33),
    ((40, 37), 1000),
    ((48,), 16),
    ((47,), 16),
    ((40, 20), 20),
    ((16, 16), 16),
]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("lengths", "window"), CASES, ids=str)
def test_band_matches_dense(lengths: tuple[int, ...], window: int, heads: int) -> None:
    cu = borders(*lengths)
    R = sum(lengths)
    inputs = attention_inputs(R, R, heads, 8, 12)
    run = functools.partial(outputs_and_gradients, inputs=inputs, cotangents=[torch.randn(R, 12)])
    truth = run(functools.partial(reference.windowed_attention, cu_q=cu, cu_k=cu, window=window, scale=SCALE))

    def by_band(q_RGZ: Tensor, k_KGZ: Tensor, v_KE: Tensor) -> Tensor:
        return band_attention(q_RGZ, k_KGZ, v_KE, cu, window, SCALE, block=16)

    assert all(error(value, truth[name]) < 1e-12 for name, value in run(by_band).items())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_band_is_as_exact_as_torch(dtype: torch.dtype, device: str) -> None:
    cu = borders(300, 0, 1, 700)
    inputs = {name: x.to(dtype).double() for name, x in attention_inputs(1001, 1001, 1, 128, 96).items()}
    run = functools.partial(outputs_and_gradients, inputs=inputs, cotangents=[torch.randn(1001, 96)])
    dense = functools.partial(reference.windowed_attention, window=255, scale=128**-0.5)
    truth = run(functools.partial(dense, cu_q=cu, cu_k=cu))
    there = cu.to(device)
    plain = run(functools.partial(dense, cu_q=there, cu_k=there), dtype=dtype, device=device)
    fast = run(
        lambda q_RGZ, k_KGZ, v_KE: band_attention(q_RGZ, k_KGZ, v_KE, there, 255, 128**-0.5),
        dtype=dtype,
        device=device,
    )
    assert_as_exact_as_torch(fast, plain, truth)


def test_tiles_cover_each_query_and_each_key_once() -> None:
    for R in range(70):
        band = Band(R, 20, 16)
        for tiles, side in ((band.by_query(), "queries"), (band.by_key(), "keys")):
            rows = [row + 16 * i for tile in tiles for i in range(tile.count) for row in getattr(tile, side)]
            assert sorted(rows) == list(range(R)), (R, side)


def test_no_rows() -> None:
    inputs = [x.requires_grad_() for x in attention_inputs(0, 0, 1, 8, 12).values()]
    out = attention.windowed_attention(*inputs, borders(0), None, 3, SCALE, backend="band")
    assert out.shape == (0, 12)
    assert all(gradient.numel() == 0 for gradient in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_taken_for_long_documents_of_wide_heads(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice itself, which else only a GPU makes."""
    if device == "cpu":
        monkeypatch.setattr(flash, "supports", lambda q: True)

    def chosen(documents: int, rows: int, columns: int, window: int = 1024) -> bool:
        cu, R = torch.linspace(0, documents * rows, documents + 1, device=device).int(), documents * rows
        q_RGZ = torch.empty(R, 1, 128, device=device, dtype=torch.bfloat16)
        return attention._by_band(q_RGZ, q_RGZ.new_empty(R, columns), cu, window)

    assert chosen(8, 2048, 4096)
    assert not chosen(64, 256, 4096)
    assert not chosen(8, 2048, 128)
    assert not chosen(8, 2048, 4096, window=16)
    assert not chosen(1, 16384, 4096, window=4096), "the band would take more memory than is worth the time"
