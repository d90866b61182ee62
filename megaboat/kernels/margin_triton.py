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
    h_XD: Tensor, center_D: Tensor, weight_KD: Tensor, bias_K: Tensor, side: SideGradients | None = None
) -> Tensor:
    """`margin.margins` for h in bf16, fp16 or fp32 and fp32 parameters. `center_D` gets no gradient."""
    return _Margins.apply(h_XD, center_D, weight_KD, bias_K, side)


class _Margins(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_XD, center_D, weight_KD, bias_K, side):
        h_XD = h_XD.contiguous()
        (X, D), M = h_XD.shape, bias_K.shape[0] // 2
        weight_KD = weight_KD.contiguous()
        margin_XM = h_XD.new_empty(X, M, dtype=torch.float32)
        if X > 0:
            margin_fwd_kernel[(cdiv(X, TOKENS),)](
                h_XD, center_D, weight_KD, bias_K, margin_XM, X, D, M, TOKENS, next_power_of_2(D), num_warps=8
            )
        ctx.save_for_backward(h_XD, center_D, weight_KD)
        ctx.side = side
        return margin_XM

    @staticmethod
    def backward(ctx, dmargin_XM):
        h_XD, center_D, weight_KD = ctx.saved_tensors
        (X, D), K = h_XD.shape, weight_KD.shape[0]
        dmargin_XM = dmargin_XM.contiguous()
        full = ctx.side is None
        dh_XD = torch.empty_like(h_XD) if full else None
        block = next_power_of_2(D)
        programs, warps = share_rows(X, block)
        partial = h_XD.new_empty(programs, K * (D + 1), dtype=torch.float32)  # of the weights, then of the biases
        if X > 0:
            margin_bwd_kernel[(programs,)](
                h_XD, center_D, weight_KD, dmargin_XM, dh_XD, partial, X, D, K // 2, full, block, num_warps=warps,
            )  # fmt: skip
        if not full:
            ctx.side.thin.append((dmargin_XM, weight_KD))
        dweight, dbias_K = partial.sum(0).split([K * D, K])
        return dh_XD, None, dweight.view(K, D), dbias_K, None


@triton.jit
def load_difference(weight, m, D, o_d, m_d):
    """What decides for module m: its second logit's weights less its first's."""
    skip = weight + 2 * m * D + o_d
    return tl.load(skip + D, mask=m_d, other=0.0) - tl.load(skip, mask=m_d, other=0.0)


@triton.jit
def margin_fwd_kernel(h, center, weight, bias, margin, X, D, M: tl.constexpr, BX: tl.constexpr, BD: tl.constexpr):
    o_x = tl.program_id(0).to(tl.int64) * BX + tl.arange(0, BX)
    o_d = tl.arange(0, BD)
    m_x, m_d = o_x < X, o_d < D
    b_h = tl.load(h + o_x[:, None] * D + o_d[None, :], mask=m_x[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    b_h -= tl.load(center + o_d, mask=m_d, other=0.0)[None, :]
    for m in tl.static_range(M):
        b_weight = load_difference(weight, m, D, o_d, m_d)
        offset = tl.load(bias + 2 * m + 1) - tl.load(bias + 2 * m)
        tl.store(margin + o_x * M + m, tl.sum(b_h * b_weight[None, :], axis=1) + offset, mask=m_x)


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
        b_weights = b_weights + (load_difference(weight, m, D, o_d, m_d),)
        b_sums = b_sums + (tl.zeros([BD], tl.float32), tl.full((), 0.0, tl.float32))
    for i_x in range(i_p, X, tl.num_programs(0)):
        b_h = tl.load(h + i_x * D + o_d, mask=m_d, other=0.0).to(tl.float32) - b_center
        b_dh = tl.zeros([BD], tl.float32)
        b_new = ()
        for m in tl.static_range(M):
            d = tl.load(dmargin + i_x * M + m)
            b_dh += d * b_weights[m]
            b_new = b_new + (b_sums[2 * m] + d * b_h, b_sums[2 * m + 1] + d)
        b_sums = b_new
        if FULL:
            tl.store(dh + i_x * D + o_d, b_dh.to(dh.dtype.element_ty), mask=m_d)
    p_weights = partial + i_p * 2 * M * (D + 1)
    for m in tl.static_range(M):
        p_skip, p_bias = p_weights + 2 * m * D + o_d, p_weights + 2 * M * D + 2 * m
        tl.store(p_skip, -b_sums[2 * m], mask=m_d)
        tl.store(p_skip + D, b_sums[2 * m], mask=m_d)
        tl.store(p_bias, -b_sums[2 * m + 1])
        tl.store(p_bias + 1, b_sums[2 * m + 1])
