"""SeqBoat the way that the published program computes it, for a row beside ours in `bench train`.

The moving average is a convolution by FFT in fp32, its kernel as long as the row and made anew in each step; active
tokens are scattered into a tensor that is padded to the row with most of them; attention goes over blocks of W
queries with the keys of their own and the previous block. All else is ours. Rows are documents, since an FFT cannot
forget at their borders.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megaboat.kernels import ActiveRows, windowed_attention

Way = dict[str, Callable[..., Any]]
"""Functions of `megaboat.kernels` by name, computed otherwise."""


def ema_by_fft(
    x_BTD: Tensor,
    decay_DN: Tensor,
    weight_DN: Tensor,
    skip_D: Tensor,
    first_BT: Tensor | None = None,
    state_BDN: Tensor | None = None,
    silu: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`kernels.ema` of rows that are one document each and begin without a state; no state is returned."""
    power_T = torch.arange(x_BTD.shape[1], device=x_BTD.device, dtype=decay_DN.dtype)
    with torch.autocast(x_BTD.device.type, enabled=False):
        kernel_DT = torch.einsum("dn,dnt->dt", weight_DN, torch.exp(decay_DN.log()[..., None] * power_T))
    x_BDT = x_BTD.transpose(1, 2).to(kernel_DT.dtype)
    y_BDT = convolve(x_BDT, kernel_DT) + skip_D[:, None] * x_BDT
    y_BTD = y_BDT.transpose(1, 2).to(x_BTD.dtype)
    return F.silu(y_BTD) if silu else y_BTD, None


def convolve(x_BDT: Tensor, kernel_DT: Tensor) -> Tensor:
    """y_t = sum over l of kernel_l x_(t - l), over the T that lie in one piece in memory."""
    T = x_BDT.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(x_BDT, 2 * T) * torch.fft.rfft(kernel_DT, 2 * T), 2 * T)[..., :T]


def begin_plan(active_X: Tensor, cu_seqlens: Tensor, *_: object) -> ActiveRows:
    """B rows of equal length, each with as many rows here as the one with most; waits for that number."""
    B = len(cu_seqlens) - 1
    active_BT = active_X.view(B, -1)
    place_BT = active_BT.cumsum(1) - 1
    longest = max(1, int(place_BT[:, -1].max()) + 1)
    row_BT = torch.arange(B, device=active_X.device)[:, None] * longest + place_BT
    row_X = row_BT.masked_fill(~active_BT, -1).flatten()
    slot_X = row_X.masked_fill(row_X < 0, B * longest)
    token_R = row_X.new_zeros(B * longest + 1).scatter_(0, slot_X, torch.arange(len(row_X), device=row_X.device))
    cu_rows = torch.arange(B + 1, device=active_X.device, dtype=torch.int32) * longest
    return ActiveRows(token_R[:-1], row_X, cu_rows, longest)


def compress(x_XD: Tensor, rows: ActiveRows, side: object = None) -> Tensor:
    """(X, D) -> (R, D), zeros where padded; inactive tokens collide in a slot that is dropped."""
    slot_X = rows.row_X.masked_fill(rows.row_X < 0, rows.count)
    out_RD = x_XD.new_zeros(rows.count + 1, x_XD.shape[1])
    return out_RD.scatter(0, slot_X[:, None].expand_as(x_XD), x_XD)[:-1]


def join_rows(
    base_XD: Tensor, y_RD: Tensor, confidence_X: Tensor, rows: ActiveRows, residual_XD: Tensor | None = None
) -> Tensor:
    """Each token gathers its row, inactive ones a row of zeros in front."""
    with_zero_RD = F.pad(y_RD, (0, 0, 1, 0))
    y_XD = with_zero_RD.gather(0, (rows.row_X + 1)[:, None].expand(-1, y_RD.shape[1]))
    y_XD = base_XD + (confidence_X[:, None] * y_XD).to(base_XD.dtype)
    return y_XD if residual_XD is None else F.silu(residual_XD + y_XD)


PLAIN_AUTOGRAD: Way = {
    "side_gradients": lambda x: None,
    "fan_out": lambda x, uses, side=None: (x,) * uses,
}
PUBLISHED: Way = PLAIN_AUTOGRAD | {
    "ema": ema_by_fft,
    "begin_plan": begin_plan,
    "compress": compress,
    "join_rows": join_rows,
    "windowed_attention": partial(windowed_attention, backend="banded"),
}
