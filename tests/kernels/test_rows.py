"""Plan, compress and extract: order, inverses, gradients, none and all active, and a fixed capacity."""

import pytest
import torch
from torch import Tensor

from megaboat.kernels import compress, extract, plan_rows, reference
from megaboat.kernels.rows import begin_plan
from tests.kernels.checks import DEVICES

BORDERS = [0, 3, 3, 40, 41, 100]  # documents of every size, an empty one among them
RATIOS = [0.0, 0.3, 1.0]


def activity(ratio: float, device: str) -> tuple[Tensor, Tensor]:
    return torch.rand(100, device=device) < ratio, torch.tensor(BORDERS, dtype=torch.int32, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_plan_keeps_order_and_documents(ratio: float, device: str) -> None:
    active_X, cu = activity(ratio, device)
    rows = plan_rows(active_X, cu)
    assert torch.equal(rows.token_R, active_X.nonzero().flatten())
    assert torch.equal(rows.row_X[rows.token_R], torch.arange(rows.count, device=device))
    assert (rows.row_X[~active_X] == -1).all()
    inside = [int(active_X[a:b].sum()) for a, b in zip(BORDERS, BORDERS[1:], strict=False)]
    assert rows.cu_seqlens.dtype == torch.int32
    assert rows.cu_seqlens.diff().tolist() == inside
    assert rows.longest == max(inside)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_compress_and_extract_match_the_reference(ratio: float, device: str) -> None:
    active_X, cu = activity(ratio, device)
    rows = plan_rows(active_X, cu)
    x_XD = torch.randn(100, 7, device=device, requires_grad=True)
    h_RD = compress(x_XD, rows)
    assert torch.equal(h_RD, reference.compress(x_XD, active_X))
    dh_RD = torch.randn_like(h_RD)
    assert torch.equal(torch.autograd.grad(h_RD, x_XD, dh_RD)[0], reference.extract(dh_RD, active_X))

    y_RD = torch.randn(rows.count, 7, device=device, requires_grad=True)
    y_XD = extract(y_RD, rows)
    assert torch.equal(y_XD, reference.extract(y_RD, active_X))
    dy_XD = torch.randn_like(y_XD)
    assert torch.equal(torch.autograd.grad(y_XD, y_RD, dy_XD)[0], dy_XD[active_X])
    assert torch.equal(compress(extract(y_RD, rows), rows), y_RD)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_spare_rows_fill_up_to_a_multiple(ratio: float, device: str) -> None:
    active_X, cu = activity(ratio, device)
    rows, exact = begin_plan(active_X, cu, multiple=16).finish(), plan_rows(active_X, cu)
    assert rows.count % 16 == 0
    assert rows.spare == rows.count - exact.count < 16
    assert torch.equal(rows.row_X, exact.row_X)
    assert rows.token_R.tolist() == [*exact.token_R.tolist(), *[-1] * rows.spare]
    assert rows.cu_seqlens.tolist() == [*exact.cu_seqlens.tolist(), rows.count]
    assert exact.longest is not None
    assert rows.longest == max(exact.longest, rows.spare)
    x_XD = torch.randn(100, 7, device=device, requires_grad=True)
    h_RD = compress(x_XD, rows)
    assert torch.equal(h_RD[: exact.count], compress(x_XD, exact))
    assert (h_RD[exact.count :] == 0).all()
    y_RD = torch.randn(rows.count, 7, device=device, requires_grad=True)
    (dy_RD,) = torch.autograd.grad(extract(y_RD, rows).sum(), y_RD)
    assert dy_RD.sum(1).tolist() == [7.0] * exact.count + [0.0] * rows.spare


def test_gradcheck() -> None:
    rows = plan_rows(*activity(0.3, "cpu"))
    x_XD = torch.randn(100, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: extract(compress(x, rows) ** 2, rows), x_XD)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("ratio", "capacity"), [(0.0, 16), (0.3, 64), (1.0, 100), (1.0, 48)])
def test_capacity_drops_the_latest_and_counts_them(ratio: float, capacity: int, device: str) -> None:
    active_X, cu = activity(ratio, device)
    rows = plan_rows(active_X, cu, capacity=capacity)
    kept_X = active_X & (active_X.cumsum(0) <= capacity)
    exact = plan_rows(kept_X, cu)
    assert rows.count == capacity
    assert rows.used is not None
    assert rows.overflow is not None
    assert int(rows.used) == exact.count
    assert int(rows.overflow) == int(active_X.sum()) - exact.count
    assert torch.equal(rows.row_X, exact.row_X)
    assert torch.equal(rows.token_R[: exact.count], exact.token_R)
    assert rows.cu_seqlens.tolist() == [*exact.cu_seqlens.tolist(), capacity]


@pytest.mark.parametrize("device", DEVICES)
def test_capacity_zeroes_unused_rows_whatever_is_in_them(device: str) -> None:
    active_X, cu = activity(0.3, device)
    rows, exact = plan_rows(active_X, cu, capacity=64), plan_rows(active_X, cu)
    x_XD = torch.randn(100, 7, device=device, requires_grad=True)
    h_RD = compress(x_XD, rows)
    assert torch.equal(h_RD[: exact.count], compress(x_XD, exact))
    assert (h_RD[exact.count :] == 0).all()
    dh_RD = torch.full_like(h_RD, torch.nan)
    dh_RD[: exact.count] = 1
    assert torch.equal(torch.autograd.grad(h_RD, x_XD, dh_RD)[0], active_X[:, None].expand(100, 7).float())

    y_RD = dh_RD.requires_grad_()
    y_XD = extract(y_RD, rows)
    assert torch.equal(y_XD, active_X[:, None].expand(100, 7).float())
    (dy_RD,) = torch.autograd.grad(y_XD.sum(), y_RD)
    assert dy_RD.sum(1).tolist() == [7.0] * exact.count + [0.0] * (64 - exact.count)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_only_finish_waits_for_the_device() -> None:
    active_X, cu = activity(0.3, "cuda")
    x_XD = torch.randn(100, 7, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = begin_plan(active_X, cu)
        for rows in (pending.finish(), plan_rows(active_X, cu, capacity=64)):
            extract(compress(x_XD, rows), rows).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(x_XD.grad, 2.0 * active_X[:, None].expand(100, 7)), "each plan once"
