"""The Triton cross-entropy: on a GPU, and on any CPU through Triton's interpreter (test_interpreter.py)."""

import pytest
import torch

from megaboat.kernels.loss import _nll_and_gradient
from tests.kernels.checks import assert_as_exact_as_torch
from tests.kernels.test_ema_triton import DEVICES

loss_triton = pytest.importorskip("megaboat.kernels.loss_triton", reason="triton is not installed")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("V", [3, 4096, 5001])
def test_cross_entropy(V: int, device: str) -> None:
    logits_XV = 5 * torch.randn(4, V, dtype=torch.float64)
    targets_X = torch.tensor([0, V - 1, -100, V // 2])

    def run(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return dict(zip(("nll", "gradient"), _nll_and_gradient(logits_XV.to(dtype), targets_X, -100), strict=True))

    given_XV = logits_XV.to(device, torch.float32)
    nll_X = loss_triton.cross_entropy_triton(given_XV, targets_X.to(device), -100)
    mine = {"nll": nll_X, "gradient": given_XV}
    assert_as_exact_as_torch(mine, run(torch.float32), run(torch.float64))
