"""Queries or keys on GPUs: z is read once and each head written once, where torch makes ten passes over all heads.

A program takes BR rows; their angles' sines and cosines, which all heads share, are worked out once. Pairs
(2i, 2i+1) are two tiles [BR, Z / 2], `even` and `odd`. Gradients of scale and shift leave each program as partial sums
over its rows and are added up by one small sum, so they are deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaboat.kernels.sizes import cdiv, next_power_of_2

ROWS = 16


def rotary_heads_triton(
    z_RZ: Tensor, scale_GZ: Tensor, bias_GZ: Tensor, positions_R: Tensor, turns_P: Tensor
) -> Tensor:
    """`rotary.rotary_heads` for z in bf16, fp16 or fp32; turns_P: fp64, turns a position of each pair."""
    return _RotaryHeads.apply(z_RZ, positions_R, turns_P, scale_GZ, bias_GZ)[0]


def rotary_pair_triton(
    z_RY: Tensor, query_2GZ: tuple[Tensor, Tensor], key_2GZ: tuple[Tensor, Tensor], positions_R: Tensor, turns_P: Tensor
) -> tuple[Tensor, Tensor]:
    """`rotary.rotary_pair` likewise: one launch each way for both."""
    return _RotaryHeads.apply(z_RY, positions_R, turns_P, *query_2GZ, *key_2GZ)


class _RotaryHeads(torch.autograd.Function):
    """Of one scale and bias, or of two: so many outputs. The last is of the last Z columns of z."""

    @staticmethod
    def forward(ctx, z_RY, positions_R, turns_P, *affine):  # type: ignore[no-untyped-def]
        z_RY, positions_R = z_RY.contiguous(), positions_R.contiguous()
        affine = tuple(each.contiguous() for each in affine)
        (R, Y), (G, Z) = z_RY.shape, affine[0].shape
        outs = [z_RY.new_empty(R, G, Z) for _ in affine[::2]]
        if R > 0:
            rotary_fwd_kernel[(cdiv(R, ROWS),)](
                z_RY, *affine[:2], *affine[-2:], positions_R, turns_P, outs[0], outs[-1], R, G, len(outs) > 1, Y,
                Z // 2, ROWS, next_power_of_2(Z // 2),
            )  # fmt: skip
        ctx.save_for_backward(z_RY, positions_R, turns_P, *affine[::2])
        return tuple(outs)

    @staticmethod
    def backward(ctx, *douts):  # type: ignore[no-untyped-def]
        z_RY, positions_R, turns_P, *scales = ctx.saved_tensors
        douts = tuple(dout.contiguous() for dout in douts)
        (R, Y), (G, Z) = z_RY.shape, scales[0].shape
        dz_RY = torch.empty_like(z_RY)
        programs = cdiv(R, ROWS)
        partial = z_RY.new_empty(programs, 2 * len(scales), G, Z, dtype=torch.float32)
        if R > 0:
            rotary_bwd_kernel[(programs,)](
                z_RY, scales[0], scales[-1], positions_R, turns_P, douts[0], douts[-1], dz_RY, partial,
                R, G, len(scales) > 1, Y, Z // 2, ROWS, next_power_of_2(Z // 2),
            )  # fmt: skip
        return dz_RY, None, None, *partial.sum(0).to(scales[0].dtype).unbind()


@triton.jit
def phases(positions, frequency, o_r, o_p, R, PAIRS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cosine and sine of position times frequency. Whole turns are dropped and the rest is brought to an eighth of a
    turn in fp64; from there Taylor's series are exact to fp32. The library's functions, made for any angle, spill."""
    b_position = tl.load(positions + o_r, mask=o_r < R, other=0).to(tl.float64)
    b_turns = b_position[:, None] * tl.load(frequency + o_p, mask=o_p < PAIRS, other=0.0)[None, :]
    b_quarter = tl.floor(4 * b_turns + 0.5)
    b_x = ((b_turns - 0.25 * b_quarter) * 6.283185307179586).to(tl.float32)
    b_quarter = (b_quarter.to(tl.int64) & 3).to(tl.int32)
    b_x2 = b_x * b_x
    b_sin = b_x + b_x * b_x2 * (-1 / 6 + b_x2 * (1 / 120 + b_x2 * (-1 / 5040 + b_x2 * (1 / 362880))))
    b_cos = 1 + b_x2 * (-1 / 2 + b_x2 * (1 / 24 + b_x2 * (-1 / 720 + b_x2 * (1 / 40320 - b_x2 * (1 / 3628800)))))
    is_odd = (b_quarter & 1) == 1
    b_turned_cos = tl.where(is_odd, -b_sin, b_cos)
    b_turned_sin = tl.where(is_odd, b_cos, b_sin)
    b_sign = tl.where(b_quarter >= 2, -1.0, 1.0)
    return b_turned_cos * b_sign, b_turned_sin * b_sign


@triton.jit
def load_pairs(z, o_row, o_p, m_rp, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    o_z = o_row[:, None] * WIDTH + 2 * o_p[None, :]
    b_even = tl.load(z + o_z, mask=m_rp, other=0.0).to(tl.float32)
    b_odd = tl.load(z + o_z + 1, mask=m_rp, other=0.0).to(tl.float32)
    return o_z, b_even, b_odd


@triton.jit
def store_pairs(p_even, b_even, b_odd, m_rp):  # type: ignore[no-untyped-def]
    tl.store(p_even, b_even.to(p_even.dtype.element_ty), mask=m_rp)
    tl.store(p_even + 1, b_odd.to(p_even.dtype.element_ty), mask=m_rp)


@triton.jit
def rotary_fwd_kernel(  # type: ignore[no-untyped-def]
    z, scale, bias, scale_2, bias_2, positions, frequency, out, out_2, R, G, TWO: tl.constexpr, WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_p = tl.arange(0, BP)
    m_rp = (o_r < R)[:, None] & (o_p < PAIRS)[None, :]
    o_row = o_r.to(tl.int64)
    b_cos, b_sin = phases(positions, frequency, o_r, o_p, R, PAIRS)
    _, b_even, b_odd = load_pairs(z, o_row, o_p, m_rp, WIDTH)
    turn_heads(scale, bias, out, b_even, b_odd, b_cos, b_sin, o_row, o_p, m_rp, G, PAIRS)
    if TWO:
        if WIDTH > 2 * PAIRS:
            _, b_even, b_odd = load_pairs(z + 2 * PAIRS, o_row, o_p, m_rp, WIDTH)
        turn_heads(scale_2, bias_2, out_2, b_even, b_odd, b_cos, b_sin, o_row, o_p, m_rp, G, PAIRS)


@triton.jit
def turn_heads(  # type: ignore[no-untyped-def]
    scale, bias, out, b_even, b_odd, b_cos, b_sin, o_row, o_p, m_rp, G, PAIRS: tl.constexpr
):
    m_p = o_p < PAIRS
    for g in range(G):
        o_g = g * 2 * PAIRS + 2 * o_p
        b_u = b_even * tl.load(scale + o_g, mask=m_p, other=0.0) + tl.load(bias + o_g, mask=m_p, other=0.0)
        b_v = b_odd * tl.load(scale + o_g + 1, mask=m_p, other=0.0) + tl.load(bias + o_g + 1, mask=m_p, other=0.0)
        o_out = o_row[:, None] * (2 * G * PAIRS) + o_g[None, :]
        tl.store(out + o_out, (b_u * b_cos - b_v * b_sin).to(out.dtype.element_ty), mask=m_rp)
        tl.store(out + o_out + 1, (b_u * b_sin + b_v * b_cos).to(out.dtype.element_ty), mask=m_rp)


@triton.jit
def rotary_bwd_kernel(  # type: ignore[no-untyped-def]
    z, scale, scale_2, positions, frequency, dout, dout_2, dz, partial, R, G, TWO: tl.constexpr, WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0).to(tl.int64)
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_p = tl.arange(0, BP)
    m_rp = (o_r < R)[:, None] & (o_p < PAIRS)[None, :]
    o_row = o_r.to(tl.int64)
    b_cos, b_sin = phases(positions, frequency, o_r, o_p, R, PAIRS)
    o_z, b_even, b_odd = load_pairs(z, o_row, o_p, m_rp, WIDTH)
    b_deven = tl.zeros([BR, BP], tl.float32)
    b_dodd = tl.zeros([BR, BP], tl.float32)
    p_partial = partial + i_p * ((8 if TWO else 4) * G * PAIRS)
    b_deven, b_dodd = turn_back(
        scale, dout, p_partial, b_deven, b_dodd, b_even, b_odd, b_cos, b_sin, o_row, o_p, m_rp, G, PAIRS
    )
    if TWO:
        p_partial += 4 * G * PAIRS
        if WIDTH > 2 * PAIRS:
            store_pairs(dz + o_z, b_deven, b_dodd, m_rp)
            o_z, b_even, b_odd = load_pairs(z + 2 * PAIRS, o_row, o_p, m_rp, WIDTH)
            o_z += 2 * PAIRS
            b_deven = tl.zeros([BR, BP], tl.float32)
            b_dodd = tl.zeros([BR, BP], tl.float32)
        b_deven, b_dodd = turn_back(
            scale_2, dout_2, p_partial, b_deven, b_dodd, b_even, b_odd, b_cos, b_sin, o_row, o_p, m_rp, G, PAIRS
        )
    store_pairs(dz + o_z, b_deven, b_dodd, m_rp)


@triton.jit
def turn_back(  # type: ignore[no-untyped-def]
    scale, dout, p_partial, b_deven, b_dodd, b_even, b_odd, b_cos, b_sin, o_row, o_p, m_rp, G, PAIRS: tl.constexpr
):
    """The gradient of z so far plus that of these heads; sums for their scales and biases."""
    m_p = o_p < PAIRS
    for g in range(G):
        o_g = g * 2 * PAIRS + 2 * o_p
        o_out = o_row[:, None] * (2 * G * PAIRS) + o_g[None, :]
        b_first = tl.load(dout + o_out, mask=m_rp, other=0.0).to(tl.float32)
        b_second = tl.load(dout + o_out + 1, mask=m_rp, other=0.0).to(tl.float32)
        b_du = b_first * b_cos + b_second * b_sin
        b_dv = b_second * b_cos - b_first * b_sin
        b_deven += b_du * tl.load(scale + o_g, mask=m_p, other=0.0)[None, :]
        b_dodd += b_dv * tl.load(scale + o_g + 1, mask=m_p, other=0.0)[None, :]
        p_scale = p_partial + o_g
        p_bias = p_scale + 2 * G * PAIRS
        tl.store(p_scale, tl.sum(b_du * b_even, axis=0), mask=m_p)
        tl.store(p_scale + 1, tl.sum(b_dv * b_odd, axis=0), mask=m_p)
        tl.store(p_bias, tl.sum(b_du, axis=0), mask=m_p)
        tl.store(p_bias + 1, tl.sum(b_dv, axis=0), mask=m_p)
    return b_deven, b_dodd
