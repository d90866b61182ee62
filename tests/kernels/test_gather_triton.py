"""The Triton row gather: on a GPU, and on any CPU through Triton's interpreter (test_interpreter.py)."""

import pytest
import torch

from tests.kernels.test_ema_triton import DEVICES

gather_triton = pytest.importorskip("megaboat.kernels.gather_triton", reason="triton is not installed")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("D", [1, 100, 5000])
def test_gather_rows(D: int, dtype: torch.dtype, device: str) -> None:
    x_XD = torch.randn(9, D, dtype=dtype, device=device)
    index_R = torch.tensor([3, -1, 8, 0, 0, -1], device=device)
    out_RD = gather_triton.gather_rows_triton(x_XD, index_R)
    assert torch.equal(out_RD, x_XD[index_R.clamp_min(0)] * (index_R >= 0)[:, None])


@pytest.mark.parametrize("device", DEVICES)
def test_gather_from_or_to_no_rows(device: str) -> None:
    none = torch.tensor([-1, -1], device=device)
    assert (gather_triton.gather_rows_triton(torch.randn(0, 4, device=device), none) == 0).all()
    assert gather_triton.gather_rows_triton(torch.randn(3, 4, device=device), none[:0]).shape == (0, 4)
