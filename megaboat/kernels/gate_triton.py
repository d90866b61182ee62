"""SiLU gates on GPUs: three tensors moved forward and five backward, where torch moves five and nine.

Rows may lie apart, as those of one map's outputs beside another's do (`linear.joint_linear`).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaboat.kernels.sizes import cdiv, next_power_of_2

BLOCK, COLUMNS = 2048, 512  # numbers of a program, and how many of them lie in a row at most


def silu_gate_triton(a: Tensor, b: Tensor) -> Tensor:
    """`gate.silu_gate` for bf16, fp16 and fp32."""
    return _SiluGate.apply(a, b)


def silu_halves_triton(ab: Tensor) -> Tensor:
    """`silu_gate_triton` of the last dimension's halves: (..., 2 E) -> (..., E). Their gradient is one tensor too."""
    return _SiluHalves.apply(ab)


def silu_parts_triton(x_XW: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Three parts of each row, SiLU of the first two and the third in its place. The gradient is one tensor."""
    return _SiluParts.apply(x_XW, *widths)


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(a, b)
        return _gate(_rows(a), _rows(b)).view(a.shape)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        a, b = ctx.saved_tensors
        da, db = a.new_empty(a.shape), b.new_empty(b.shape)
        _gate_back(_rows(a), _rows(b), _rows(dout), _rows(da), _rows(db))
        return da, db


class _SiluHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ab):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(ab)
        return _gate(*_rows(ab).chunk(2, 1)).view(*ab.shape[:-1], ab.shape[-1] // 2)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        (ab,) = ctx.saved_tensors
        dab = ab.new_empty(ab.shape)
        (a_XE, b_XE), (da_XE, db_XE) = _rows(ab).chunk(2, 1), _rows(dab).chunk(2, 1)
        _gate_back(a_XE, b_XE, _rows(dout), da_XE, db_XE)
        return dab


class _SiluParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_XW, A, B, C):  # type: ignore[no-untyped-def]
        x_XW = x_XW.contiguous()
        ctx.save_for_backward(x_XW)
        X = x_XW.shape[0]
        a_XA, b_XB = x_XW.new_empty(X, A), x_XW.new_empty(X, B)
        if X > 0:
            grid, block = blocks(X, A + B)
            parts_fwd_kernel[grid](x_XW, a_XA, b_XB, X, A, B, C, *block)
        return a_XA, b_XB, x_XW[:, A + B :]

    @staticmethod
    def backward(ctx, da_XA, db_XB, dc_XC):  # type: ignore[no-untyped-def]
        (x_XW,) = ctx.saved_tensors
        dx_XW = torch.empty_like(x_XW)
        X = x_XW.shape[0]
        if X > 0:
            grid, block = blocks(*x_XW.shape)
            parts = [part.contiguous() for part in (da_XA, db_XB, dc_XC)]
            parts_bwd_kernel[grid](x_XW, *parts, dx_XW, X, *(part.shape[1] for part in parts), *block)
        return dx_XW, None, None, None


def _rows(x: Tensor) -> Tensor:
    """(..., E) -> (X, E), each row in one piece."""
    x_XE = x if x.ndim == 2 else x.reshape(-1, x.shape[-1] or 1)
    return x_XE if x_XE.stride(1) == 1 else x_XE.contiguous()


def _gate(a_XE: Tensor, b_XE: Tensor) -> Tensor:
    out_XE = a_XE.new_empty(a_XE.shape)
    if out_XE.numel() > 0:
        grid, block = blocks(*a_XE.shape)
        gate_fwd_kernel[grid](a_XE, b_XE, out_XE, *a_XE.shape, a_XE.stride(0), b_XE.stride(0), *block)
    return out_XE


def _gate_back(a_XE: Tensor, b_XE: Tensor, dout_XE: Tensor, da_XE: Tensor, db_XE: Tensor) -> None:
    """Fills the last two."""
    if a_XE.numel() > 0:
        grid, block = blocks(*a_XE.shape)
        tensors = (a_XE, b_XE, dout_XE, da_XE, db_XE)
        gate_bwd_kernel[grid](*tensors, *a_XE.shape, *(tensor.stride(0) for tensor in tensors), *block)


def blocks(X: int, E: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The grid over X rows of E numbers, and the rows and columns of each program."""
    columns = min(COLUMNS, next_power_of_2(E))
    rows = BLOCK // columns
    return (cdiv(X, rows), cdiv(E, columns)), (rows, columns)


@triton.jit
def tile(X, E, BX: tl.constexpr, BE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows, columns and which of them there are, of this program's block."""
    o_x = tl.program_id(0).to(tl.int64) * BX + tl.arange(0, BX)[:, None]
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)[None, :]
    return o_x, o_e, (o_x < X) & (o_e < E)


@triton.jit
def gate_fwd_kernel(a, b, out, X, E, stride_a, stride_b, BX: tl.constexpr, BE: tl.constexpr):  # type: ignore[no-untyped-def]
    o_x, o_e, m = tile(X, E, BX, BE)
    b_a = tl.load(a + o_x * stride_a + o_e, mask=m, other=0.0).to(tl.float32)
    b_b = tl.load(b + o_x * stride_b + o_e, mask=m, other=0.0).to(tl.float32)
    tl.store(out + o_x * E + o_e, (b_a * tl.sigmoid(b_a) * b_b).to(out.dtype.element_ty), mask=m)


@triton.jit
def gate_bwd_kernel(  # type: ignore[no-untyped-def]
    a, b, dout, da, db, X, E, stride_a, stride_b, stride_dout, stride_da, stride_db, BX: tl.constexpr, BE: tl.constexpr
):
    o_x, o_e, m = tile(X, E, BX, BE)
    b_a = tl.load(a + o_x * stride_a + o_e, mask=m, other=0.0).to(tl.float32)
    b_b = tl.load(b + o_x * stride_b + o_e, mask=m, other=0.0).to(tl.float32)
    b_dout = tl.load(dout + o_x * stride_dout + o_e, mask=m, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_a)
    b_slope = b_sigmoid * (1 + b_a * (1 - b_sigmoid))
    tl.store(da + o_x * stride_da + o_e, (b_dout * b_b * b_slope).to(da.dtype.element_ty), mask=m)
    tl.store(db + o_x * stride_db + o_e, (b_dout * b_a * b_sigmoid).to(db.dtype.element_ty), mask=m)


@triton.jit
def parts_fwd_kernel(x, a, b, X, A, B, C, BX: tl.constexpr, BE: tl.constexpr):  # type: ignore[no-untyped-def]
    o_x, o_e, m = tile(X, A + B, BX, BE)
    b_x = tl.load(x + o_x * (A + B + C) + o_e, mask=m, other=0.0).to(tl.float32)
    b_silu = (b_x * tl.sigmoid(b_x)).to(a.dtype.element_ty)
    tl.store(a + o_x * A + o_e, b_silu, mask=m & (o_e < A))
    tl.store(b + o_x * B + o_e - A, b_silu, mask=m & (o_e >= A))


@triton.jit
def parts_bwd_kernel(x, da, db, dc, dx, X, A, B, C, BX: tl.constexpr, BE: tl.constexpr):  # type: ignore[no-untyped-def]
    o_x, o_e, m = tile(X, A + B + C, BX, BE)
    in_c = o_e >= A + B
    b_d = tl.load(da + o_x * A + o_e, mask=m & (o_e < A), other=0.0).to(tl.float32)
    b_d += tl.load(db + o_x * B + o_e - A, mask=m & (o_e >= A) & (o_e < A + B), other=0.0).to(tl.float32)
    b_d += tl.load(dc + o_x * C + o_e - A - B, mask=m & in_c, other=0.0).to(tl.float32)
    o = o_x * (A + B + C) + o_e
    b_x = tl.load(x + o, mask=m, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_x)
    b_d *= tl.where(in_c, 1.0, b_sigmoid * (1 + b_x * (1 - b_sigmoid)))
    tl.store(dx + o, b_d.to(dx.dtype.element_ty), mask=m)
