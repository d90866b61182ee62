"""The chunked linear cross-entropy against torch's, with ignored targets and chunks that do not divide."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from megaboat.kernels import (
    linear_cross_entropy,
    loss,
    reference,
    sharded_cross_entropy,
    sharded_token_nll,
    token_nll,
)
from megaboat.kernels.loss import chunk
from tests.kernels.checks import DEVICES, FLOOR, assert_as_exact_as_torch, error, outputs_and_gradients


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "chunk", lambda vocabulary: 16)


def test_no_chunk_has_more_logits_than_a_large_vocabulary() -> None:
    assert (chunk(200_000), chunk(50_000), chunk(8192), chunk(64)) == (8192, 8192, 32_768, 8192 * 512)
    assert all(chunk(V) * V <= 8192 * 50_000 for V in range(1, 50_000, 97))


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
    floor = 2.0**-8 if dtype == torch.bfloat16 else FLOOR  # a rounding of its own, where torch is exact by luck
    assert_as_exact_as_torch(fast, run(functools.partial(plain, targets_X=targets_X), dtype=dtype), truth, floor)


@pytest.mark.parametrize("device", DEVICES)
def test_loss_in_fp64_and_token_nll(device: str) -> None:
    inputs, targets_X = loss_inputs(50, 0.3)
    truth = reference.linear_cross_entropy(**inputs, targets_X=targets_X)
    on_device = {name: value.to(device) for name, value in inputs.items()}
    nll_X = token_nll(**on_device, targets_X=targets_X.to(device))
    assert (nll_X[(targets_X == -100).to(device)] == 0).all()
    assert error(nll_X, truth) < 1e-6
    assert error(linear_cross_entropy(**on_device, targets_X=targets_X.to(device)), truth.sum()) < 1e-12


def test_a_cut_vocabulary_gives_the_same_loss_and_gradients() -> None:
    """Two holders, a thread each, with unequal parts of the vocabulary."""
    inputs, targets_X = loss_inputs(50, 0.3)
    whole = {name: value.requires_grad_() for name, value in inputs.items()}
    total = linear_cross_entropy(**whole, targets_X=targets_X)
    expected = torch.autograd.grad(total, list(whole.values()))
    barrier, slots = threading.Barrier(2), [torch.empty(0)] * 2
    cut = whole["weight_VD"].detach().split([10, len(whole["weight_VD"]) - 10])

    def hold(p: int) -> tuple[Tensor, ...]:
        def together(mine: Tensor) -> Tensor:
            slots[p] = mine
            barrier.wait(timeout=30)
            stacked = torch.stack(slots)
            barrier.wait(timeout=30)
            return stacked

        h_XD, weight_VD = whole["h_XD"].detach().requires_grad_(), cut[p].clone().requires_grad_()
        found = sharded_cross_entropy(h_XD, weight_VD, targets_X, p * 10, together)
        nll_X = sharded_token_nll(h_XD, weight_VD, targets_X, p * 10, together)
        return found.detach(), nll_X, *torch.autograd.grad(found, [h_XD, weight_VD])

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(hold, range(2)))
    for found, nll_X, *_ in parts:
        assert error(found, total) < 1e-12
        assert error(nll_X, reference.linear_cross_entropy(**whole, targets_X=targets_X)) < 1e-6
    assert error(parts[0][2] + parts[1][2], expected[0]) < 1e-12
    assert error(torch.cat([parts[0][3], parts[1][3]]), expected[1]) < 1e-12
