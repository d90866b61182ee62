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
    return _RotaryHeads.apply(z_RZ, scale_GZ, bias_GZ, positions_R, turns_P)


class _RotaryHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_RZ, scale_GZ, bias_GZ, positions_R, turns_P):  # type: ignore[no-untyped-def]
        z_RZ, positions_R = z_RZ.contiguous(), positions_R.contiguous()
        (R, Z), G = z_RZ.shape, len(scale_GZ)
        out_RGZ = z_RZ.new_empty(R, G, Z)
        if R > 0:
            rotary_fwd_kernel[(cdiv(R, ROWS),)](
                z_RZ, scale_GZ.contiguous(), bias_GZ.contiguous(), positions_R, turns_P, out_RGZ, R, G, Z // 2,
                ROWS, next_power_of_2(Z // 2),
            )  # fmt: skip
        ctx.save_for_backward(z_RZ, scale_GZ, positions_R, turns_P)
        return out_RGZ

    @staticmethod
    def backward(ctx, dout_RGZ):  # type: ignore[no-untyped-def]
        z_RZ, scale_GZ, positions_R, turns_P = ctx.saved_tensors
        (R, Z), G = z_RZ.shape, len(scale_GZ)
        dz_RZ = torch.empty_like(z_RZ)
        programs = cdiv(R, ROWS)
        partial_P2GZ = z_RZ.new_empty(programs, 2, G, Z, dtype=torch.float32)
        if R > 0:
            rotary_bwd_kernel[(programs,)](
                z_RZ, scale_GZ.contiguous(), positions_R, turns_P, dout_RGZ.contiguous(), dz_RZ, partial_P2GZ,
                R, G, Z // 2, ROWS, next_power_of_2(Z // 2),
            )  # fmt: skip
        dscale_GZ, dbias_GZ = partial_P2GZ.sum(0).to(scale_GZ.dtype).unbind()
        return dz_RZ, dscale_GZ, dbias_GZ, None, None


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
def load_pairs(z, o_row, o_p, m_rp, PAIRS: tl.constexpr):  # type: ignore[no-untyped-def]
    o_z = o_row[:, None] * (2 * PAIRS) + 2 * o_p[None, :]
    b_even = tl.load(z + o_z, mask=m_rp, other=0.0).to(tl.float32)
    b_odd = tl.load(z + o_z + 1, mask=m_rp, other=0.0).to(tl.float32)
    return o_z, b_even, b_odd


@triton.jit
def rotary_fwd_kernel(  # type: ignore[no-untyped-def]
    z, scale, bias, positions, frequency, out, R, G, PAIRS: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr
):
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_p = tl.arange(0, BP)
    m_p = o_p < PAIRS
    m_rp = (o_r < R)[:, None] & m_p[None, :]
    o_row = o_r.to(tl.int64)
    b_cos, b_sin = phases(positions, frequency, o_r, o_p, R, PAIRS)
    o_z, b_even, b_odd = load_pairs(z, o_row, o_p, m_rp, PAIRS)
    for g in range(G):
        o_g = g * 2 * PAIRS + 2 * o_p
        b_u = b_even * tl.load(scale + o_g, mask=m_p, other=0.0) + tl.load(bias + o_g, mask=m_p, other=0.0)
        b_v = b_odd * tl.load(scale + o_g + 1, mask=m_p, other=0.0) + tl.load(bias + o_g + 1, mask=m_p, other=0.0)
        o_out = o_row[:, None] * (2 * G * PAIRS) + o_g[None, :]
        tl.store(out + o_out, (b_u * b_cos - b_v * b_sin).to(out.dtype.element_ty), mask=m_rp)
        tl.store(out + o_out + 1, (b_u * b_sin + b_v * b_cos).to(out.dtype.element_ty), mask=m_rp)


@triton.jit
def rotary_bwd_kernel(  # type: ignore[no-untyped-def]
    z, scale, positions, frequency, dout, dz, partial, R, G, PAIRS: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr
):
    i_p = tl.program_id(0).to(tl.int64)
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_p = tl.arange(0, BP)
    m_p = o_p < PAIRS
    m_rp = (o_r < R)[:, None] & m_p[None, :]
    o_row = o_r.to(tl.int64)
    b_cos, b_sin = phases(positions, frequency, o_r, o_p, R, PAIRS)
    o_z, b_even, b_odd = load_pairs(z, o_row, o_p, m_rp, PAIRS)
    b_deven = tl.zeros([BR, BP], tl.float32)
    b_dodd = tl.zeros([BR, BP], tl.float32)
    for g in range(G):
        o_g = g * 2 * PAIRS + 2 * o_p
        o_out = o_row[:, None] * (2 * G * PAIRS) + o_g[None, :]
        b_first = tl.load(dout + o_out, mask=m_rp, other=0.0).to(tl.float32)
        b_second = tl.load(dout + o_out + 1, mask=m_rp, other=0.0).to(tl.float32)
        b_du = b_first * b_cos + b_second * b_sin
        b_dv = b_second * b_cos - b_first * b_sin
        b_deven += b_du * tl.load(scale + o_g, mask=m_p, other=0.0)[None, :]
        b_dodd += b_dv * tl.load(scale + o_g + 1, mask=m_p, other=0.0)[None, :]
        p_scale = partial + i_p * (4 * G * PAIRS) + o_g
        p_bias = p_scale + 2 * G * PAIRS
        tl.store(p_scale, tl.sum(b_du * b_even, axis=0), mask=m_p)
        tl.store(p_scale + 1, tl.sum(b_dv * b_odd, axis=0), mask=m_p)
        tl.store(p_bias, tl.sum(b_du, axis=0), mask=m_p)
        tl.store(p_bias + 1, tl.sum(b_dv, axis=0), mask=m_p)
    tl.store(dz + o_z, b_deven.to(dz.dtype.element_ty), mask=m_rp)
    tl.store(dz + o_z + 1, b_dodd.to(dz.dtype.element_ty), mask=m_rp)
