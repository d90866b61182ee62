"""Active rows: the plan that packs activated tokens, and the two gathers that go there and back.

Both directions are gathers and each is the other's backward, so the gradient needs no atomics and is deterministic.

Exact mode: R is the number of active tokens; it must reach the host, because it is the size of everything that follows.
`begin_plan` asks for it early and `finish` waits, with other work in between. Capacity mode: R is a fixed capacity and
nothing is copied to the host; rows beyond the active ones are zero, and active tokens beyond the capacity, the latest
first, count as inactive. Nothing there is refused while a CUDA graph is captured.

Letters: X tokens of the whole micro-batch (B * T), R active rows, S documents.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megaboat.kernels.fan import SideGradients
from megaboat.kernels.recompute import later, offer


@dataclass(frozen=True)
class ActiveRows:
    """Which token each active row is, and where each token's row lies."""

    token_R: Tensor
    """int64: the flattened token of each row, ascending; -1 for spare rows, 0 for the unused rows of capacity mode."""
    row_X: Tensor
    """int64: the row of each token; -1 where inactive."""
    cu_seqlens: Tensor
    """int32 (S + 1,): the rows of document s are cu_seqlens[s]:cu_seqlens[s+1]; documents without rows are empty.

    Where there may be spare or unused rows they are one more piece: attention then writes every row it was given.
    """
    longest: int | None = None
    """No document has more rows; None: not known on the host."""
    used: Tensor | None = None
    """Capacity mode: int32 (1,), how many of the R rows are active. None: all of them."""
    overflow: Tensor | None = None
    """Capacity mode: int64 (), how many active tokens had no row."""
    spare: int = 0
    """Rows at the end that no token has, zeros and without gradient: they make R one of few numbers."""
    told: tuple[int, ...] = ()
    """What else came to the host with the plan's sizes (`begin_plan`)."""

    @property
    def count(self) -> int:
        return self.token_R.shape[0]


def plan_rows(active_X: Tensor, cu_seqlens: Tensor, capacity: int | None = None) -> ActiveRows:
    """Pack the active tokens of documents with borders `cu_seqlens` (int32, over the flattened tokens).

    On a GPU this waits for one copy of two numbers to the host, or with a `capacity` for nothing.
    """
    if capacity is not None:
        return _plan_capacity(active_X, cu_seqlens, capacity)
    return begin_plan(active_X, cu_seqlens).finish()


@dataclass(frozen=True)
class PendingRows:
    """A plan whose size is on its way to the host."""

    token_X: Tensor
    """The token of each row, then -1: as long as R may become."""
    row_X: Tensor
    cu_seqlens: Tensor
    sizes: Tensor
    """int64 (2 or more,), pinned: active rows, the rows of the longest piece, and what else `begin_plan` was asked to
    tell; valid once `arrived` has happened."""
    multiple: int
    """R is one of this number."""
    arrived: torch.cuda.Event | None

    def finish(self) -> ActiveRows:
        """Wait for the sizes; the only place where exact mode holds the host."""
        if self.arrived is not None:
            self.arrived.synchronize()
        active, longest, *told = self.sizes.tolist()
        R = -(-active // self.multiple) * self.multiple
        return ActiveRows(self.token_X[:R], self.row_X, self.cu_seqlens, longest, spare=R - active, told=tuple(told))


def begin_plan(
    active_X: Tensor, cu_seqlens: Tensor, multiple: int = 1, tell: Callable[[Tensor], Tensor] | None = None
) -> PendingRows:
    """Start packing and the copy of the sizes; do other work on the device, then call `finish`.

    multiple: of what R is one; the rows that are missing to it are spare. A power of two. tell: takes the two sizes and
    appends what else the host shall know.
    """
    token_X, row_X, cu_rows, sizes = _place(active_X, cu_seqlens, multiple)
    sizes = sizes if tell is None else tell(sizes)
    if not active_X.is_cuda:
        return PendingRows(token_X, row_X, cu_rows, sizes, multiple, None)
    sizes = torch.empty_like(sizes, device="cpu", pin_memory=True).copy_(sizes, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return PendingRows(token_X, row_X, cu_rows, sizes, multiple, arrived)


def few_sizes(active_X: Tensor) -> int:
    """A multiple for `begin_plan` that leaves no more than 256 different R, at the cost of 1 / 256 of the tokens as
    spare rows on average; 1 on a CPU. On GPUs the library of products spends a quarter of a millisecond of the host's
    time on each size that it has not seen."""
    return 1 << max(0, (len(active_X) // 128).bit_length() - 1) if active_X.is_cuda else 1


def room(share: float, tokens: int) -> int:
    """The capacity for this share of the tokens, in rows: a multiple of 8, as products in bf16 want it."""
    return math.ceil(share * tokens / 8) * 8


def _place(active_X: Tensor, cu_seqlens: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The token of each row, -1 for what comes after the rows; the row of each token, -1 where inactive; the rows
    before each border (int32), and with a `multiple` of rows another border behind the spare ones; two sizes (int64):
    active rows, and those of the longest piece."""
    if active_X.is_cuda:
        from megaboat.kernels.rows_triton import place_triton

        return place_triton(active_X, cu_seqlens, multiple)
    X, device = len(active_X), active_X.device
    count_X = active_X.cumsum(0)
    borders = torch.nn.functional.pad(count_X, (1, 0))[cu_seqlens.long()]
    if multiple > 1:
        borders = torch.cat([borders, -(-borders[-1:] // multiple) * multiple])
    row_X = (count_X - 1).masked_fill_(~active_X, -1)
    # Inactive tokens write to one slot past the end, which is cut off.
    longest_R = X + multiple - 1
    slot_X = row_X.masked_fill(row_X < 0, longest_R)
    token_X = row_X.new_full((longest_R + 1,), -1).scatter_(0, slot_X, torch.arange(X, device=device))[:longest_R]
    total = count_X[-1] if X else count_X.new_zeros(())
    return token_X, row_X, borders.int(), torch.stack([total, borders.diff().amax()])


def _plan_capacity(active_X: Tensor, cu_seqlens: Tensor, capacity: int) -> ActiveRows:
    if active_X.is_cuda:
        from megaboat.kernels.rows_triton import place_within_triton

        row_X, token_R, cu, overflow = place_within_triton(active_X, cu_seqlens, capacity)
        return ActiveRows(token_R, row_X, cu, capacity, cu[-2:-1], overflow)
    token_X, row_X, cu_rows, sizes = _place(active_X, cu_seqlens)
    row_X = row_X.masked_fill_(row_X >= capacity, -1)
    token_R = torch.nn.functional.pad(token_X, (0, max(0, capacity - len(token_X))))[:capacity].clamp_min(0)
    cu = torch.nn.functional.pad(cu_rows.clamp_max_(capacity), (0, 1), value=capacity)
    return ActiveRows(token_R, row_X, cu, capacity, cu[-2:-1], (sizes[0] - capacity).clamp_min(0))


def compress(x_XD: Tensor, rows: ActiveRows, side: SideGradients | None = None) -> Tensor:
    """The active tokens' rows: (X, D) -> (R, D). `side`: where the gradient of x is left, as rows."""
    index_R, row_X = _both_ways(rows)
    out_RD, again = _Gather.apply(x_XD, index_R, row_X, side), later(x_XD)
    offer(out_RD, lambda: _gather_rows(again(), index_R))
    return out_RD


def extract(y_RD: Tensor, rows: ActiveRows) -> Tensor:
    """Rows back to their tokens, zeros where inactive: (R, D) -> (X, D)."""
    return _Gather.apply(y_RD, *reversed(_both_ways(rows)), None)


def _both_ways(rows: ActiveRows) -> tuple[Tensor, Tensor]:
    if rows.used is None:
        return rows.token_R, rows.row_X
    unused_R = torch.arange(rows.count, device=rows.token_R.device) >= rows.used
    return rows.token_R.masked_fill(unused_R, -1), rows.row_X


class _Gather(torch.autograd.Function):
    """out[i] = x[index[i]], zeros where the index is -1. `back` is the inverse map, so that backward is one as well."""

    @staticmethod
    def forward(ctx, x, index, back, side):  # type: ignore[no-untyped-def]
        ctx.side = side
        ctx.save_for_backward(index, back)
        return _gather_rows(x, index)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        index, back = ctx.saved_tensors
        if ctx.side is not None:
            ctx.side.rows.append((dout, back))
            return None, None, None, None
        return _gather_rows(dout, back), None, None, None


def _gather_rows(x_XD: Tensor, index_R: Tensor) -> Tensor:
    """(X, D) -> (R, D)."""
    if x_XD.is_cuda:
        from megaboat.kernels.gather_triton import gather_rows_triton

        return gather_rows_triton(x_XD, index_R)
    if x_XD.shape[0] == 0:
        return x_XD.new_zeros(index_R.shape[0], x_XD.shape[1])
    return x_XD.index_select(0, index_R.clamp_min(0)).masked_fill_((index_R < 0)[:, None], 0)
