"""The configurator's margins on GPUs: the input is read once each way, and never stored in fp32.

Gradients of the weights are summed over the rows of each program in registers and over programs by one small sum, so
they are deterministic.
"""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaboat.kernels.fan import SideGradients
from megaboat.kernels.norm_triton import share_rows
from megaboat.kernels.sizes import cdiv, next_power_of_2

TOKENS = 4  # of a program forward: they share the weights


def margins_triton(
    h_XD: Tensor, center_D: Tensor, weight_MD: Tensor, bias_M: Tensor, side: SideGradients | None = None
) -> Tensor:
    """`margin.margins` for h in bf16, fp16 or fp32 and fp32 parameters. `center_D` gets no gradient."""
    return _Margins.apply(h_XD, center_D, weight_MD, bias_M, side)


class _Margins(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_XD, center_D, weight_MD, bias_M, side):
        h_XD = h_XD.contiguous()
        (X, D), M = h_XD.shape, len(bias_M)
        weight_MD = weight_MD.contiguous()
        margin_XM = h_XD.new_empty(X, M, dtype=torch.float32)
        if X > 0:
            margin_fwd_kernel[(cdiv(X, TOKENS),)](
                h_XD, center_D, weight_MD, bias_M, margin_XM, X, D, M, TOKENS, next_power_of_2(D), num_warps=8
            )
        ctx.save_for_backward(h_XD, center_D, weight_MD)
        ctx.side = side
        return margin_XM

    @staticmethod
    def backward(ctx, dmargin_XM):
        h_XD, center_D, weight_MD = ctx.saved_tensors
        (X, D), M = h_XD.shape, len(weight_MD)
        dmargin_XM = dmargin_XM.contiguous()
        full = ctx.side is None
        dh_XD = torch.empty_like(h_XD) if full else None
        block = next_power_of_2(D)
        programs, warps = share_rows(X, block)
        partial_PMD = h_XD.new_empty(programs, M, D, dtype=torch.float32)
        if X > 0:
            margin_bwd_kernel[(programs,)](
                h_XD, center_D, weight_MD, dmargin_XM, dh_XD, partial_PMD, X, D, M, full, block, num_warps=warps,
            )  # fmt: skip
        if not full:
            ctx.side.thin.append((dmargin_XM, weight_MD))
        return dh_XD, None, partial_PMD.sum(0), dmargin_XM.sum(0), None


@triton.jit
def margin_fwd_kernel(h, center, weight, bias, margin, X, D, M: tl.constexpr, BX: tl.constexpr, BD: tl.constexpr):
    o_x = tl.program_id(0).to(tl.int64) * BX + tl.arange(0, BX)
    o_d = tl.arange(0, BD)
    m_x, m_d = o_x < X, o_d < D
    b_h = tl.load(h + o_x[:, None] * D + o_d[None, :], mask=m_x[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    b_h -= tl.load(center + o_d, mask=m_d, other=0.0)[None, :]
    for m in tl.static_range(M):
        b_weight = tl.load(weight + m * D + o_d, mask=m_d, other=0.0)
        b_margin = tl.sum(b_h * b_weight[None, :], axis=1) + tl.load(bias + m)
        tl.store(margin + o_x * M + m, b_margin, mask=m_x)


@triton.jit
def margin_bwd_kernel(
    h, center, weight, dmargin, dh, partial, X, D, M: tl.constexpr, FULL: tl.constexpr, BD: tl.constexpr
):
    i_p = tl.program_id(0).to(tl.int64)  # so that i_x is too
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_center = tl.load(center + o_d, mask=m_d, other=0.0)
    b_weights = ()
    b_sums = ()
    for m in tl.static_range(M):
        b_weights = b_weights + (tl.load(weight + m * D + o_d, mask=m_d, other=0.0),)
        b_sums = b_sums + (tl.zeros([BD], tl.float32),)
    for i_x in range(i_p, X, tl.num_programs(0)):
        b_h = tl.load(h + i_x * D + o_d, mask=m_d, other=0.0).to(tl.float32) - b_center
        b_dh = tl.zeros([BD], tl.float32)
        b_new = ()
        for m in tl.static_range(M):
            d = tl.load(dmargin + i_x * M + m)
            b_dh += d * b_weights[m]
            b_new = b_new + (b_sums[m] + d * b_h,)
        b_sums = b_new
        if FULL:
            tl.store(dh + i_x * D + o_d, b_dh.to(dh.dtype.element_ty), mask=m_d)
    for m in tl.static_range(M):
        tl.store(partial + (i_p * M + m) * D + o_d, b_sums[m], mask=m_d)
