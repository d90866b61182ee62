"""The chunked linear cross-entropy against torch's, with ignored targets and chunks that do not divide."""

import functools

import pytest
import torch
from torch import Tensor

from megaboat.kernels import linear_cross_entropy, loss, reference, token_nll
from tests.kernels.checks import DEVICES, assert_as_exact_as_torch, error, outputs_and_gradients


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 16)


def loss_inputs(X: int, ignored: float) -> tuple[dict[str, Tensor], Tensor]:
    inputs = {
        "h_XD": torch.randn(X, 6, dtype=torch.float64),
        "weight_VD": torch.randn(11, 6, dtype=torch.float64),
    }
    targets_X = torch.randint(11, (X,)).masked_fill(torch.rand(X) < ignored, -100)
    return inputs, targets_X


def plain(h_XD: Tensor, weight_VD: Tensor, targets_X: Tensor) -> Tensor:
    logits_XV = h_XD @ weight_VD.T
    wide = torch.promote_types(logits_XV.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(logits_XV.to(wide), targets_X, reduction="sum")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("X", "ignored"), [(1, 0.0), (16, 0.3), (50, 0.3), (50, 1.0)])
def test_loss_matches_torch(X: int, ignored: float, dtype: torch.dtype, device: str) -> None:
    inputs, targets_X = loss_inputs(X, ignored)
    inputs = {name: value.to(dtype).double() for name, value in inputs.items()}
    run = functools.partial(outputs_and_gradients, inputs=inputs, cotangents=[torch.tensor(0.7)])
    truth = run(functools.partial(plain, targets_X=targets_X))
    fast = run(functools.partial(linear_cross_entropy, targets_X=targets_X.to(device)), dtype=dtype, device=device)
    assert_as_exact_as_torch(fast, run(functools.partial(plain, targets_X=targets_X), dtype=dtype), truth)


@pytest.mark.parametrize("device", DEVICES)
def test_loss_in_fp64_and_token_nll(device: str) -> None:
    inputs, targets_X = loss_inputs(50, 0.3)
    truth = reference.linear_cross_entropy(**inputs, targets_X=targets_X)
    on_device = {name: value.to(device) for name, value in inputs.items()}
    nll_X = token_nll(**on_device, targets_X=targets_X.to(device))
    assert (nll_X[(targets_X == -100).to(device)] == 0).all()
    assert error(nll_X, truth) < 1e-6
    assert error(linear_cross_entropy(**on_device, targets_X=targets_X.to(device)), truth.sum()) < 1e-12
