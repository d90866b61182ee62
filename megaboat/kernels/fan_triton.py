"""Gradients that meet, on GPUs: each is read once, and what is added in fp32 is rounded once."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaboat.kernels.fan import SideGradients
from megaboat.kernels.margin_triton import load_difference
from megaboat.kernels.sizes import cdiv, next_power_of_2

BLOCK = 2048
TOKENS = 4  # of a program: they share the weights of a thin map


def fan_out_triton(x: Tensor, uses: int, side: SideGradients | None = None) -> tuple[Tensor, ...]:
    """`fan.fan_out`."""
    return _FanOut.apply(x, uses, side)


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, uses, side):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.side, ctx.shape = side, x.shape
        return tuple(x.view_as(x) for _ in range(uses))

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        found = [gradient for gradient in gradients if gradient is not None]
        dx = add_triton(found) if found else None
        side = ctx.side
        if side is not None:
            # Each use has run by now: autograd waits for all of them, gradient or none.
            for i in range(max(len(side.rows), len(side.thin))):
                dx = meet_triton(dx, *(parts[i] if i < len(parts) else None for parts in (side.rows, side.thin)))
            side.rows.clear(), side.thin.clear()
        return None if dx is None else dx.view(ctx.shape), None, None


def meet_triton(dense: Tensor | None, rows: tuple[Tensor, Tensor] | None, thin: tuple[Tensor, Tensor] | None) -> Tensor:
    """dense + the rows' + the thin map's, each of which may be missing but not both of the last two: (X, D)."""
    like = dense if dense is not None else rows[0] if rows is not None else thin[1]  # type: ignore[index]
    X, D = len((rows or thin or (None, None))[1 if rows else 0]), like.shape[-1]  # type: ignore[arg-type]
    dense_XD = None if dense is None else dense.contiguous()
    dy_RD, row_X = (None, None) if rows is None else (rows[0].contiguous(), rows[1])
    dm_XM, weight_KD = (None, None) if thin is None else (thin[0].contiguous(), thin[1].contiguous())
    out_XD = like.new_empty(X, D)
    if X > 0:
        meet_kernel[(cdiv(X, TOKENS),)](
            dense_XD, dy_RD, row_X, dm_XM, weight_KD, out_XD, X, D, 0 if dm_XM is None else dm_XM.shape[1],
            dense is not None, rows is not None, TOKENS, next_power_of_2(D), num_warps=8,
        )  # fmt: skip
    return out_XD


def add_triton(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape and dtype."""
    if len(parts) == 1:
        return parts[0]
    first, second, *others = [part.contiguous() for part in parts]
    third = others[0] if others else first
    out = torch.empty_like(first)
    if out.numel() > 0:
        grid = (cdiv(out.numel(), BLOCK),)
        add_kernel[grid](first, second, third, out, out.numel(), bool(others), BLOCK, num_warps=8)
    return add_triton([out, *others[1:]])


@triton.jit
def add_kernel(a, b, c, out, size, THREE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.load(a + o, mask=o < size, other=0.0).to(tl.float32)
    b_sum += tl.load(b + o, mask=o < size, other=0.0).to(tl.float32)
    if THREE:
        b_sum += tl.load(c + o, mask=o < size, other=0.0).to(tl.float32)
    tl.store(out + o, b_sum.to(out.dtype.element_ty), mask=o < size)


@triton.jit
def meet_kernel(  # type: ignore[no-untyped-def]
    dense, dy, row, dm, weight, out, X, D, M: tl.constexpr, DENSE: tl.constexpr, ROWS: tl.constexpr,
    BX: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_x = tl.program_id(0).to(tl.int64) * BX + tl.arange(0, BX)
    o_d = tl.arange(0, BD)
    m_x, m_d = o_x < X, o_d < D
    m_xd = m_x[:, None] & m_d[None, :]
    o_xd = o_x[:, None] * D + o_d[None, :]
    b_sum = tl.zeros([BX, BD], tl.float32)
    if DENSE:
        b_sum += tl.load(dense + o_xd, mask=m_xd, other=0.0).to(tl.float32)
    if ROWS:
        i_r = tl.load(row + o_x, mask=m_x, other=-1)
        m_rd = (i_r >= 0)[:, None] & m_d[None, :]
        b_sum += tl.load(dy + i_r[:, None] * D + o_d[None, :], mask=m_rd, other=0.0).to(tl.float32)
    for m in tl.static_range(M):
        b_dm = tl.load(dm + o_x * M + m, mask=m_x, other=0.0).to(tl.float32)
        b_weight = load_difference(weight, m, D, o_d, m_d)
        b_sum += b_dm[:, None] * b_weight[None, :]
    tl.store(out + o_xd, b_sum.to(out.dtype.element_ty), mask=m_xd)
