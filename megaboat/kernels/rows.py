"""Active rows: the plan that packs activated tokens, and the two gathers that go there and back.

Both directions are gathers and each is the other's backward, so the gradient needs no atomics and is deterministic.
Letters: X tokens of the whole micro-batch (B * T), R active rows, S documents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ActiveRows:
    """Which token each active row is, and where each token's row lies."""

    token_R: Tensor
    """int64: the flattened token of each row, ascending."""
    row_X: Tensor
    """int64: the row of each token; -1 where inactive."""
    cu_seqlens: Tensor
    """int32 (S + 1,): the rows of document s are cu_seqlens[s]:cu_seqlens[s+1]; documents without rows are empty."""

    @property
    def count(self) -> int:
        return self.token_R.shape[0]


def plan_rows(active_X: Tensor, cu_seqlens: Tensor) -> ActiveRows:
    """Pack the active tokens of documents with borders `cu_seqlens` (int32, over the flattened tokens).

    One host synchronisation on a GPU: the number of rows decides the size of everything that follows.
    """
    count_X = active_X.cumsum(0)
    token_R = active_X.nonzero().flatten()
    row_X = torch.where(active_X, count_X - 1, -1)
    before = torch.cat([count_X.new_zeros(1), count_X])
    return ActiveRows(token_R, row_X, before[cu_seqlens.long()].int())


def compress(x_XD: Tensor, rows: ActiveRows) -> Tensor:
    """The active tokens' rows: (X, D) -> (R, D)."""
    return _Compress.apply(x_XD, rows.token_R, rows.row_X)


def extract(y_RD: Tensor, rows: ActiveRows) -> Tensor:
    """Rows back to their tokens, zeros where inactive: (R, D) -> (X, D)."""
    return _Extract.apply(y_RD, rows.token_R, rows.row_X)


def _spread(y_RD: Tensor, row_X: Tensor) -> Tensor:
    if y_RD.shape[0] == 0:
        return y_RD.new_zeros(row_X.shape[0], y_RD.shape[1])
    return y_RD.index_select(0, row_X.clamp_min(0)).masked_fill_((row_X < 0)[:, None], 0)


class _Compress(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_XD, token_R, row_X):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(row_X)
        return x_XD.index_select(0, token_R)

    @staticmethod
    def backward(ctx, dy_RD):  # type: ignore[no-untyped-def]
        (row_X,) = ctx.saved_tensors
        return _spread(dy_RD, row_X), None, None


class _Extract(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RD, token_R, row_X):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(token_R)
        return _spread(y_RD, row_X)

    @staticmethod
    def backward(ctx, dx_XD):  # type: ignore[no-untyped-def]
        (token_R,) = ctx.saved_tensors
        return dx_XD.index_select(0, token_R), None, None
