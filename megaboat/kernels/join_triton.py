"""Where a layer's paths meet, on GPUs: gather, scale, add, residual and SiLU in one pass each way.

A program takes one token. In the backward pass it also writes its row's gradient and its confidence's: a token has at
most one row, so nothing is added up and the result is deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaboat.kernels.recompute import offer
from megaboat.kernels.rows import ActiveRows
from megaboat.kernels.sizes import next_power_of_2


def join_rows_triton(
    base_XD: Tensor, y_RD: Tensor, confidence_X: Tensor, rows: ActiveRows, residual_XD: Tensor | None
) -> Tensor:
    """`join.join_rows` for bf16, fp16 and fp32."""
    # Rows without token are written by nobody.
    unused = rows.spare if rows.used is None else rows.count
    return _JoinRows.apply(base_XD, y_RD, confidence_X, rows.row_X, unused, residual_XD)


class _JoinRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base_XD, y_RD, confidence_X, row_X, unused, residual_XD):  # type: ignore[no-untyped-def]
        base_XD, y_RD, confidence_X = base_XD.contiguous(), y_RD.contiguous(), confidence_X.contiguous()
        X, D = base_XD.shape
        through_silu = residual_XD is not None
        residual_XD = residual_XD.contiguous() if through_silu else None
        out_XD = torch.empty_like(residual_XD if through_silu else base_XD)
        sum_XD = torch.empty_like(base_XD) if through_silu else None
        if X > 0:
            join_fwd_kernel[(X,)](
                base_XD, y_RD, confidence_X, row_X, residual_XD, sum_XD, out_XD, D, through_silu,
                next_power_of_2(D),
            )  # fmt: skip
        if sum_XD is not None:
            offer(out_XD, lambda: torch.nn.functional.silu(sum_XD))
        ctx.save_for_backward(y_RD, confidence_X, row_X, sum_XD)
        ctx.unused, ctx.dtypes = unused, (base_XD.dtype, residual_XD.dtype if through_silu else None)
        return out_XD

    @staticmethod
    def backward(ctx, dout_XD):  # type: ignore[no-untyped-def]
        y_RD, confidence_X, row_X, sum_XD = ctx.saved_tensors
        dout_XD = dout_XD.contiguous()
        X, D = dout_XD.shape
        through_silu = sum_XD is not None
        dsum_XD = torch.empty_like(sum_XD) if through_silu else dout_XD
        dy_RD = torch.empty_like(y_RD)
        if ctx.unused:
            dy_RD[len(dy_RD) - ctx.unused :].zero_()
        dconfidence_X = torch.empty_like(confidence_X)
        if X > 0:
            join_bwd_kernel[(X,)](
                dout_XD, y_RD, confidence_X, row_X, sum_XD, dsum_XD, dy_RD, dconfidence_X, D, through_silu,
                next_power_of_2(D),
            )  # fmt: skip
        base_dtype, residual_dtype = ctx.dtypes
        dresidual_XD = dsum_XD.to(residual_dtype) if through_silu else None
        return dsum_XD.to(base_dtype), dy_RD, dconfidence_X, None, None, dresidual_XD


@triton.jit
def join_fwd_kernel(  # type: ignore[no-untyped-def]
    base, y, confidence, row, residual, summed, out, D, THROUGH_SILU: tl.constexpr, BD: tl.constexpr
):
    i_x = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    i_r = tl.load(row + i_x)
    b_sum = tl.load(base + i_x * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_y = tl.load(y + i_r * D + o_d, mask=o_d < tl.where(i_r >= 0, D, 0), other=0.0).to(tl.float32)
    b_sum += tl.load(confidence + i_x).to(tl.float32) * b_y
    if THROUGH_SILU:
        b_sum += tl.load(residual + i_x * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_sum = b_sum.to(summed.dtype.element_ty)  # so that the output comes back from what is kept
        tl.store(summed + i_x * D + o_d, b_sum, mask=m_d)
        b_sum = b_sum.to(tl.float32)
        b_sum *= tl.sigmoid(b_sum)
    tl.store(out + i_x * D + o_d, b_sum.to(out.dtype.element_ty), mask=m_d)


@triton.jit
def join_bwd_kernel(  # type: ignore[no-untyped-def]
    dout, y, confidence, row, summed, dsum, dy, dconfidence, D, THROUGH_SILU: tl.constexpr, BD: tl.constexpr
):
    i_x = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    i_r = tl.load(row + i_x)
    m_y = o_d < tl.where(i_r >= 0, D, 0)
    b_dsum = tl.load(dout + i_x * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    if THROUGH_SILU:
        b_sum = tl.load(summed + i_x * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_sigmoid = tl.sigmoid(b_sum)
        b_dsum *= b_sigmoid * (1 + b_sum * (1 - b_sigmoid))
        tl.store(dsum + i_x * D + o_d, b_dsum.to(dsum.dtype.element_ty), mask=m_d)
    b_y = tl.load(y + i_r * D + o_d, mask=m_y, other=0.0).to(tl.float32)
    b_dy = tl.load(confidence + i_x).to(tl.float32) * b_dsum
    tl.store(dy + i_r * D + o_d, b_dy.to(dy.dtype.element_ty), mask=m_y)
    tl.store(dconfidence + i_x, tl.sum(b_dsum * b_y, axis=0).to(dconfidence.dtype.element_ty))
