"""Layer normalisation on GPUs: one read and one write forward, two reads and one write backward.

Torch would cast bf16 to fp32, normalise and cast back: three passes each way. Gradients of scale and shift are summed
over the rows of each program in registers and over programs by one small sum, so they are deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaboat.kernels.sizes import next_power_of_2

PROGRAMS = 528  # of 8 warps, four on each of a Hopper's 132 multiprocessors: rows enough in flight, few partial sums


def share_rows(rows: int, block: int) -> tuple[int, int]:
    """Programs and warps of each for rows of up to `block` numbers that a program takes one by one: 8 numbers a lane,
    for the lanes of a row wait for each other."""
    warps = min(8, max(1, block // 256))
    return min(rows, PROGRAMS * 8 // warps), warps


def layer_norm_triton(x: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float) -> Tensor:
    """`norm.layer_norm` for x in bf16, fp16 or fp32 of any shape."""
    return _LayerNorm.apply(x, weight_D, bias_D, eps)[0]


def branch_norm_triton(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`norm.branch_norm` likewise."""
    return _LayerNorm.apply(x, weight_D, bias_D, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, bias_D, eps):  # type: ignore[no-untyped-def]
        x_XD = x.reshape(-1, x.shape[-1]).contiguous()
        X, D = x_XD.shape
        y_XD = torch.empty_like(x_XD)
        stats_X2 = x_XD.new_empty(X, 2, dtype=torch.float32)
        if X > 0:
            block = next_power_of_2(D)
            norm_fwd_kernel[(X,)](
                x_XD, weight_D, bias_D, y_XD, stats_X2, D, eps, weight_D is not None, block,
                num_warps=min(4, max(1, block // 512)),
            )  # fmt: skip
        ctx.save_for_backward(x_XD, weight_D, stats_X2)
        ctx.set_materialize_grads(False)  # there is no second gradient where nobody goes on with x
        return y_XD.view_as(x), x.view_as(x)

    @staticmethod
    def backward(ctx, dy, dx):  # type: ignore[no-untyped-def]
        if dy is None:
            return dx, None, None, None
        x_XD, weight_D, stats_X2 = ctx.saved_tensors
        X, D = x_XD.shape
        affine = weight_D is not None
        dx_XD = torch.empty_like(x_XD)
        beside = dx is not None
        block = next_power_of_2(D)
        programs, warps = share_rows(X, block)
        partial_P2D = x_XD.new_empty(programs if affine else 0, 2, D, dtype=torch.float32)
        if X > 0:
            norm_bwd_kernel[(programs,)](
                x_XD, weight_D, stats_X2, dy.contiguous(), dx.contiguous() if beside else dx_XD, dx_XD, partial_P2D,
                X, D, affine, beside, block, num_warps=warps,
            )  # fmt: skip
        if not affine:
            return dx_XD.view_as(dy), None, None, None
        dweight_D, dbias_D = partial_P2D.sum(0).to(weight_D.dtype).unbind()  # a tensor as an iterator is slower
        return dx_XD.view_as(dy), dweight_D, dbias_D, None


@triton.jit
def norm_fwd_kernel(x, weight, bias, y, stats, D, eps, AFFINE: tl.constexpr, BD: tl.constexpr):  # type: ignore[no-untyped-def]
    i_x = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_x = tl.load(x + i_x * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    mean = tl.sum(b_x, axis=0) / D
    b_centred = tl.where(m_d, b_x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(b_centred * b_centred, axis=0) / D + eps)
    b_y = b_centred * rstd
    if AFFINE:
        b_y = b_y * tl.load(weight + o_d, mask=m_d, other=0.0) + tl.load(bias + o_d, mask=m_d, other=0.0)
    tl.store(y + i_x * D + o_d, b_y.to(y.dtype.element_ty), mask=m_d)
    tl.store(stats + i_x * 2, mean)
    tl.store(stats + i_x * 2 + 1, rstd)


@triton.jit
def norm_bwd_kernel(  # type: ignore[no-untyped-def]
    x, weight, stats, dy, beside, dx, partial, X, D, AFFINE: tl.constexpr, BESIDE: tl.constexpr, BD: tl.constexpr
):
    i_p = tl.program_id(0).to(tl.int64)  # so that i_x is too
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_dweight = tl.zeros([BD], tl.float32)
    b_dbias = tl.zeros([BD], tl.float32)
    b_weight = tl.full([BD], 1.0, tl.float32)
    if AFFINE:
        b_weight = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    for i_x in range(i_p, X, tl.num_programs(0)):
        mean, rstd = tl.load(stats + i_x * 2), tl.load(stats + i_x * 2 + 1)
        b_x = tl.load(x + i_x * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_dy = tl.load(dy + i_x * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_normal = tl.where(m_d, (b_x - mean) * rstd, 0.0)
        b_dweight += b_dy * b_normal
        b_dbias += b_dy
        b_dnormal = b_dy * b_weight
        along = tl.sum(b_dnormal * b_normal, axis=0) / D
        b_dx = (b_dnormal - tl.sum(b_dnormal, axis=0) / D - b_normal * along) * rstd
        if BESIDE:
            b_dx += tl.load(beside + i_x * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        tl.store(dx + i_x * D + o_d, b_dx.to(dx.dtype.element_ty), mask=m_d)
    if AFFINE:
        p_partial = partial + i_p * 2 * D + o_d
        tl.store(p_partial, b_dweight, mask=m_d)
        tl.store(p_partial + D, b_dbias, mask=m_d)
