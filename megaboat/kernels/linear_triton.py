"""Sums over the rows of a matrix on GPUs, at the speed of reading it and in the same order each time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaboat.kernels.sizes import cdiv

PROGRAMS = 66  # down a column of blocks: with 8 columns four on each of a Hopper's 132 multiprocessors
ROWS, COLUMNS = 16, 256


def column_sum_triton(x_XE: Tensor) -> Tensor:
    """The sum over rows in fp32: (X, E) -> (E,)."""
    x_XE = x_XE.contiguous()
    X, E = x_XE.shape
    programs = max(1, min(PROGRAMS, cdiv(X, ROWS)))
    partial_PE = x_XE.new_empty(programs, E, dtype=torch.float32)
    column_sum_kernel[(programs, cdiv(E, COLUMNS))](x_XE, partial_PE, X, E, ROWS, COLUMNS)
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
