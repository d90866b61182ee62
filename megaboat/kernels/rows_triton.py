"""The plan of active rows on GPUs: two launches, where torch takes ten and more."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaboat.kernels.sizes import cdiv

BLOCK = 1024


def place_triton(active_X: Tensor, cu_seqlens: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rows._place`."""
    X, borders, active_X = len(active_X), len(cu_seqlens), active_X.contiguous()  # one of several modules' columns
    count_X = active_X.cumsum(0)
    row_X = torch.empty_like(count_X)
    token_X = row_X.new_empty(X + multiple - 1)
    cu_rows = cu_seqlens.new_empty(borders + (multiple > 1), dtype=torch.int32)
    sizes = row_X.new_empty(2)
    place_kernel[(cdiv(len(token_X), BLOCK) + 1,)](
        active_X, count_X, cu_seqlens, token_X, row_X, cu_rows, sizes, X, borders, multiple, BLOCK, num_warps=8
    )
    return token_X, row_X, cu_rows, sizes


@triton.jit
def place_kernel(  # type: ignore[no-untyped-def]
    active, count, cu, token, row, cu_rows, sizes, X, borders, MULTIPLE: tl.constexpr, BLOCK: tl.constexpr
):
    """The first program takes the borders, each other one a block of tokens, and of rows that no token may have."""
    total = tl.load(count + X - 1, mask=X > 0, other=0)
    if tl.program_id(0) > 0:
        o_x = (tl.program_id(0) - 1) * BLOCK + tl.arange(0, BLOCK)
        b_count = tl.load(count + o_x, mask=o_x < X, other=0)
        b_active = tl.load(active + o_x, mask=o_x < X, other=0) != 0
        b_row = tl.where(b_active, b_count - 1, -1)
        tl.store(row + o_x, b_row, mask=o_x < X)
        tl.store(token + b_row, o_x.to(tl.int64), mask=b_active)
        tl.store(token + o_x, tl.full([BLOCK], -1, tl.int64), mask=(o_x >= total) & (o_x < X + MULTIPLE - 1))
    else:
        b_longest = tl.zeros([BLOCK], tl.int64)
        for s in range(0, borders, BLOCK):
            o_s = s + tl.arange(0, BLOCK)
            b_before = rows_before(count, cu, o_s, o_s < borders)
            tl.store(cu_rows + o_s, b_before.to(tl.int32), mask=o_s < borders)
            m_s = o_s + 1 < borders
            b_after = rows_before(count, cu, o_s + 1, m_s)
            b_longest = tl.maximum(b_longest, tl.where(m_s, b_after - b_before, 0))
        longest = tl.max(b_longest, axis=0)
        if MULTIPLE > 1:
            end = (total + MULTIPLE - 1) // MULTIPLE * MULTIPLE
            tl.store(cu_rows + borders, end.to(tl.int32))
            longest = tl.maximum(longest, end - total)
        tl.store(sizes, total)
        tl.store(sizes + 1, longest)


def place_within_triton(active_X: Tensor, cu_seqlens: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The row of each token (int64, -1 where it has none), the token of each of `capacity` rows (int64, 0 for unused
    ones), the rows before each border and `capacity` (int32), and how many active tokens have none (int64)."""
    X, borders, active_X = len(active_X), len(cu_seqlens), active_X.contiguous()  # one of several modules' columns
    count_X = active_X.cumsum(0)
    row_X, token_R, overflow = torch.empty_like(count_X), count_X.new_empty(capacity), count_X.new_empty(())
    cu_rows = cu_seqlens.new_empty(borders + 1, dtype=torch.int32)
    place_within_kernel[(cdiv(max(X, capacity), BLOCK) + 1,)](
        active_X, count_X, cu_seqlens, row_X, token_R, cu_rows, overflow, X, borders, capacity, BLOCK, num_warps=8
    )
    return row_X, token_R, cu_rows, overflow


@triton.jit
def place_within_kernel(  # type: ignore[no-untyped-def]
    active, count, cu, row, token, cu_rows, overflow, X, borders, capacity, BLOCK: tl.constexpr
):
    """The first program takes the borders, each other one a block of tokens and of rows that may be unused."""
    total = tl.load(count + X - 1, mask=X > 0, other=0)
    if tl.program_id(0) > 0:
        o = (tl.program_id(0) - 1) * BLOCK + tl.arange(0, BLOCK)
        b_count = tl.load(count + o, mask=o < X, other=0)
        b_active = tl.load(active + o, mask=o < X, other=0) != 0
        b_row = tl.where(b_active & (b_count <= capacity), b_count - 1, -1)
        tl.store(row + o, b_row, mask=o < X)
        tl.store(token + b_row, o.to(tl.int64), mask=b_row >= 0)
        tl.store(token + o, tl.zeros([BLOCK], tl.int64), mask=(o >= total) & (o < capacity))
    else:
        for s in range(0, borders, BLOCK):
            o_s = s + tl.arange(0, BLOCK)
            b_before = tl.minimum(rows_before(count, cu, o_s, o_s < borders), capacity)
            tl.store(cu_rows + o_s, b_before.to(tl.int32), mask=o_s < borders)
        tl.store(cu_rows + borders, capacity)
        tl.store(overflow, tl.maximum(total - capacity, 0))


@triton.jit
def rows_before(count, cu, o_s, m_s):  # type: ignore[no-untyped-def]
    b_token = tl.load(cu + o_s, mask=m_s, other=0).to(tl.int64)
    return tl.load(count + b_token - 1, mask=b_token > 0, other=0)
