"""What products leave to be done over rows: sums of them at the speed of reading and in the same order each time, and
the bias and the zeros of a product whose number of rows only the device knows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 66  # down a column of blocks: with 8 columns four on each of a Hopper's 132 multiprocessors
ROWS, COLUMNS = 16, 256


def column_sum_triton(x_XE: Tensor) -> Tensor:
    """The sum over rows in fp32: (X, E) -> (E,)."""
    x_XE = x_XE.contiguous()
    X, E = x_XE.shape
    programs = max(1, min(PROGRAMS, triton.cdiv(X, ROWS)))
    partial_PE = x_XE.new_empty(programs, E, dtype=torch.float32)
    column_sum_kernel[(programs, triton.cdiv(E, COLUMNS))](x_XE, partial_PE, X, E, ROWS, COLUMNS)
    return partial_PE.sum(0)


@triton.jit
def column_sum_kernel(x, partial, X, E, BX: tl.constexpr, BE: tl.constexpr):  # type: ignore[no-untyped-def]
    i_p = tl.program_id(0)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    b_sum = tl.zeros([BX, BE], tl.float32)
    for i_x in range(i_p * BX, X, tl.num_programs(0) * BX):
        o_x = i_x + tl.arange(0, BX)
        m_xe = (o_x < X)[:, None] & (o_e < E)[None, :]
        b_sum += tl.load(x + o_x.to(tl.int64)[:, None] * E + o_e[None, :], mask=m_xe, other=0.0).to(tl.float32)
    tl.store(partial + i_p * E + o_e, tl.sum(b_sum, axis=0), mask=o_e < E)


def finish_triton(out_RE: Tensor, bias_E: Tensor | None, used: Tensor) -> Tensor:
    """In place: out + bias in the first `used` rows (int32 (1,)), zeros in the others, whatever lies there."""
    R, E = out_RE.shape
    if R > 0:
        grid = (triton.cdiv(R, ROWS), triton.cdiv(E, COLUMNS))
        finish_kernel[grid](out_RE, bias_E, used, R, E, bias_E is not None, ROWS, COLUMNS)
    return out_RE


@triton.jit
def finish_kernel(out, bias, used, R, E, HAS_BIAS: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.load(used)
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    m_r, m_e = o_r < R, o_e < E
    o_out = o_r.to(tl.int64)[:, None] * E + o_e[None, :]
    if HAS_BIAS:
        b_out = tl.load(out + o_out, mask=(o_r < n)[:, None] & m_e[None, :], other=0.0).to(tl.float32)
        b_out += tl.load(bias + o_e, mask=m_e, other=0.0)[None, :]
        b_out = tl.where((o_r < n)[:, None], b_out, 0.0)
    else:
        m_r &= o_r >= n
        b_out = tl.zeros([BR, BE], tl.float32)
    tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=m_r[:, None] & m_e[None, :])
