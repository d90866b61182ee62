"""The Triton plan and gather of rows: on a GPU, and on any CPU through Triton's interpreter (test_interpreter.py)."""

import pytest
import torch

from megaboat.kernels.rows import begin_plan
from tests.kernels.test_ema_triton import DEVICES

gather_triton = pytest.importorskip("megaboat.kernels.gather_triton", reason="triton is not installed")

from megaboat.kernels import rows_triton  # noqa: E402


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("borders", [[0, 3, 3, 40, 41, 100], [0, 100], [*range(0, 1300, 7), 1300], [0]])
def test_plan_of_rows(borders: list[int], multiple: int, ratio: float, device: str) -> None:
    active_X = torch.rand(borders[-1]) < ratio
    cu = torch.tensor(borders, dtype=torch.int32)
    of_two_X2 = torch.stack([active_X, ~active_X], 1).to(device)  # a layer's second module skips what the first takes
    placed = rows_triton.place_triton(of_two_X2[:, 0], cu.to(device), multiple)
    token_X, row_X, cu_rows, sizes = (x.cpu() for x in placed)
    assert cu_rows.dtype == torch.int32
    assert len(token_X) == len(active_X) + multiple - 1
    active = int(active_X.sum())
    assert torch.equal(token_X[:active], active_X.nonzero().flatten())
    assert (token_X[active:] == -1).all()
    if len(borders) == 1:
        assert (sizes.tolist(), row_X.tolist(), cu_rows.tolist()) == ([0, 0], [], [0] * (1 + (multiple > 1)))
        return
    rows = begin_plan(active_X, cu, multiple).finish()
    assert sizes.tolist() == [active, rows.longest]
    assert torch.equal(row_X, rows.row_X)
    assert torch.equal(cu_rows, rows.cu_seqlens)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("capacity", [8, 40, 3000])
@pytest.mark.parametrize("borders", [[0, 3, 3, 40, 41, 100], [*range(0, 1300, 7), 1300], [0]])
def test_plan_of_a_fixed_number_of_rows(borders: list[int], capacity: int, ratio: float, device: str) -> None:
    active_X = torch.rand(borders[-1]) < ratio
    cu = torch.tensor(borders, dtype=torch.int32)
    of_two_X2 = torch.stack([active_X, ~active_X], 1).to(device)
    planned = rows_triton.place_within_triton(of_two_X2[:, 0], cu.to(device), capacity)
    row_X, token_R, cu_rows, overflow = (x.cpu() for x in planned)
    kept_X = active_X & (active_X.cumsum(0) <= capacity)
    tokens = kept_X.nonzero().flatten()
    assert torch.equal(row_X, torch.where(kept_X, kept_X.cumsum(0) - 1, -1))
    assert torch.equal(token_R, torch.nn.functional.pad(tokens, (0, capacity - len(tokens))))
    before = torch.nn.functional.pad(kept_X.cumsum(0), (1, 0))[cu.long()]
    assert cu_rows.dtype == torch.int32
    assert cu_rows.tolist() == [*before.tolist(), capacity]
    assert int(overflow) == int(active_X.sum()) - len(tokens)
