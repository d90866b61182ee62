"""Backward pass of the EMA on the device; `ema_common_triton` explains the manner and the letters.

One reverse pass that needs no stored state. With u_t the adjoint of s_t divided by the weight, and w = du/dq,

    w_t = q w_{t+1} + u_{t+1}      u_t = q u_{t+1} + dy_t      dx_t = sum_n c u_t
    dc = sum_t x_t u_t             dq = c sum_t x_t w_t        then u = w = 0 where t opened a document

which differentiates y_t = sum_l c q^l x_{t-l} and nothing else; a given state before the row acts as an input x_{-1}.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from megaboat.kernels.ema_common_triton import (
    GROUP,
    chunk_decay,
    fill,
    forget,
    lanes,
    load_rows,
    reset_byte,
    scan_kernel,
    sigmoid,
    store_rows,
    weighted_sum,
)


@triton.jit
def through_silu(b_dy, b_pre):
    """Gradient before SiLU, fp32; d silu(p)/dp = sigma (1 + p (1 - sigma))."""
    b_dy, b_pre = b_dy.to(tl.float32), b_pre.to(tl.float32)
    b_sigma = sigmoid(b_pre)
    return b_dy * b_sigma * (1.0 + b_pre * (1.0 - b_sigma))


@triton.jit
def retreat(b_u, b_w, b_q, b_dy, N: tl.constexpr):
    """One token back: w = q w + u, then u = q u + dy."""
    b_u_next = ()
    b_w_next = ()
    for n in tl.static_range(N):
        b_w_next = b_w_next + (tl.fma(b_q[n], b_w[n], b_u[n]),)
        b_u_next = b_u_next + (tl.fma(b_q[n], b_u[n], b_dy),)
    return b_u_next, b_w_next


@triton.jit
def inject(b_u, p_dstate, mask, N: tl.constexpr, HAS_DSTATE: tl.constexpr):
    """Add the gradient of the row's last state where the mask says that this token is the last."""
    if HAS_DSTATE:
        b_next = ()
        for n in tl.static_range(N):
            b_next = b_next + (b_u[n] + tl.load(p_dstate + n, mask=mask, other=0.0),)
        b_u = b_next
    return b_u


@triton.jit
def accumulate(b_sum, b_u, b_x, N: tl.constexpr):
    """sum += u x, lane by lane; x is one vector or a tuple of N."""
    b_next = ()
    for n in tl.static_range(N):
        b_next = b_next + (tl.fma(b_u[n], b_x, b_sum[n]),)
    return b_next


@triton.jit
def take_dy(b_dy, b_pre, p_dpre, mask, SILU: tl.constexpr):
    """dy in fp32; with SILU taken through it, and stored."""
    b_dy = b_dy.to(tl.float32)
    if SILU:
        b_dy = through_silu(b_dy, b_pre)
        tl.store(p_dpre, b_dy.to(p_dpre.dtype.element_ty), mask=mask)
    return b_dy


@scan_kernel
def ema_bwd_state_kernel(
    dy, pre, dpre, decay, resets, dstate, carry, broken, T, K, G,
    D: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    HAS_RESETS: tl.constexpr, HAS_DSTATE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """carry[b, k] (2, N, D): u and w after chunk k had it started from zero. With SILU also dpre, dy through SiLU.

    Grid (D / BD, K - 1, B) over chunks 1..K-1, chunk 0 handing its adjoint to no other, or (D / BD, K, B) with SILU.
    """
    i_d, i_k, i_b = tl.program_id(0), tl.program_id(1) + (0 if SILU else 1), tl.program_id(2)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_q = load_rows(decay + o_d * N, 1, m_d, N)
    b_u = fill(0.0, BD, N)
    b_w = fill(0.0, BD, N)
    dstate += i_b.to(tl.int64) * D * N + o_d * N
    length = min(C, T - i_k * C)
    p_start = (i_b.to(tl.int64) * T + i_k * C) * D
    dy += p_start + o_d
    pre += p_start + o_d
    dpre += p_start + o_d
    p_resets = resets + i_b * G + i_k * (C // GROUP)
    last = (tl.cdiv(length, GROUP) - 1) * GROUP
    whole = length >= last + GROUP
    seen = 0
    b_dys = load_rows(dy + last * D, D, lanes(o_d, D, whole), GROUP)
    b_pres = load_rows(pre + last * D, D, lanes(o_d, D, whole), GROUP) if SILU else b_dys
    for back in range(0, length, GROUP):
        t = last - back
        earlier = t - GROUP
        byte = reset_byte(p_resets, t // GROUP, HAS_RESETS)
        b_dy_now = b_dys
        b_dys = load_rows(dy + earlier * D, D, lanes(o_d, D, earlier >= 0), GROUP)
        b_pre_now = b_pres
        b_pres = load_rows(pre + earlier * D, D, lanes(o_d, D, earlier >= 0), GROUP) if SILU else b_dys
        seen = seen | byte
        if (byte == 0) & (length >= t + GROUP + HAS_DSTATE):
            for j in tl.static_range(GROUP):
                p_dpre = dpre + (t + GROUP - 1 - j) * D
                b_dy = take_dy(b_dy_now[GROUP - 1 - j], b_pre_now[GROUP - 1 - j], p_dpre, m_d, SILU)
                b_u, b_w = retreat(b_u, b_w, b_q, b_dy, N)
        else:
            end = min(t + GROUP, length)
            for i in range(t, end):
                at = t + end - 1 - i
                b_one = tl.load(dy + at * D, mask=m_d)
                b_pre = tl.load(pre + at * D, mask=m_d) if SILU else b_one
                b_one = take_dy(b_one, b_pre, dpre + at * D, m_d, SILU)
                b_u, b_w = retreat(b_u, b_w, b_q, b_one, N)
                b_u = inject(b_u, dstate, lanes(o_d, D, i_k * C + at == T - 1), N, HAS_DSTATE)
                b_u = forget(b_u, (byte >> (at - t)) & 1, N)
                b_w = forget(b_w, (byte >> (at - t)) & 1, N)
    p_carry = carry + (i_b * K + i_k).to(tl.int64) * 2 * N * D + o_d
    store_rows(p_carry, D, b_u, m_d, N)
    store_rows(p_carry + N * D, D, b_w, m_d, N)
    if i_d == 0:
        tl.store(broken + i_b * K + i_k, (seen != 0).to(tl.uint8))


@scan_kernel
def ema_bwd_carry_kernel(
    decay, carry, broken, K,
    D: tl.constexpr, N: tl.constexpr, LOG_C: tl.constexpr, BE: tl.constexpr, HAS_RESETS: tl.constexpr,
):  # fmt: skip
    """Links the chunks in place, from chunk K - 2 down to 1: U = q^C U + u, W = q^C W + C q^(C-1) U + w."""
    i_e, i_b = tl.program_id(0), tl.program_id(1)
    o_e = i_e * BE + tl.arange(0, BE)  # element n * D + d
    m_e = o_e < N * D
    o_dn = (o_e % D) * N + o_e // D
    b_decay, b_slope = chunk_decay(tl.load(decay + o_dn, mask=m_e, other=0.0), LOG_C)
    stride = 2 * N * D
    p_carry = carry + i_b.to(tl.int64) * K * stride + o_e
    p_last = p_carry + (K - 1) * stride
    b_U = tl.load(p_last, mask=m_e)
    b_W = tl.load(p_last + N * D, mask=m_e)
    for back in range(2, K, GROUP):
        b_us = ()
        b_ws = ()
        for j in tl.static_range(GROUP):
            k = K - back - j
            b_us = b_us + (tl.load(p_carry + k * stride, mask=lanes(o_e, N * D, k > 0)),)
            b_ws = b_ws + (tl.load(p_carry + k * stride + N * D, mask=lanes(o_e, N * D, k > 0)),)
        for j in tl.static_range(GROUP):
            k = K - back - j
            if HAS_RESETS:
                cut = tl.load(broken + i_b * K + k, mask=k > 0, other=0)
                b_U = tl.where(cut != 0, 0.0, b_U)
                b_W = tl.where(cut != 0, 0.0, b_W)
            b_W = tl.fma(b_decay, b_W, tl.fma(b_slope, b_U, b_ws[j]))
            b_U = tl.fma(b_decay, b_U, b_us[j])
            tl.store(p_carry + k * stride, b_U, mask=lanes(o_e, N * D, k > 0))
            tl.store(p_carry + k * stride + N * D, b_W, mask=lanes(o_e, N * D, k > 0))


@triton.jit
def collect(b_u, b_w, b_dc, b_dq, b_dskip, b_c, b_skip, b_x, b_dy, p_dx, m_d, N: tl.constexpr):
    """Store a token's dx; the sums over tokens with what this one adds."""
    b_dc = accumulate(b_dc, b_u, b_x, N)
    b_dq = accumulate(b_dq, b_w, b_x, N)
    b_dskip = tl.fma(b_x, b_dy, b_dskip)
    b_dx = weighted_sum(b_u, b_c, b_skip * b_dy, N)
    tl.store(p_dx, b_dx.to(p_dx.dtype.element_ty), mask=m_d)
    return b_dc, b_dq, b_dskip


@triton.jit
def store_shares(
    b_u, b_w, b_dc, b_dq, b_q, b_c, p_dcoef, p_state, p_dstate, m_d, is_start, D: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """d decay and d weight of a chunk; at a row's start with the given state's part in them, and its gradient."""
    for n in tl.static_range(N):
        b_dq_n = b_dq[n]
        b_dc_n = b_dc[n]
        if is_start:
            # One more step back, to the given state: it acts as the input of a token before the row, state by state.
            b_h = tl.load(p_state + n, mask=m_d)
            b_u_n = b_q[n] * b_u[n]
            b_dc_n = tl.fma(b_h, b_u_n, b_dc_n)
            b_dq_n = tl.fma(b_h, tl.fma(b_q[n], b_w[n], b_u[n]), b_dq_n)
            tl.store(p_dstate + n, b_c[n] * b_u_n, mask=m_d)
        tl.store(p_dcoef + n * D, b_c[n] * b_dq_n, mask=m_d)
        tl.store(p_dcoef + (N + n) * D, b_dc_n, mask=m_d)


@scan_kernel
def ema_bwd_input_kernel(
    x, dy, decay, weight, skip, resets, state, carry, dstate, dx, dcoef, dstate_in, T, K, G,
    D: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, HAS_RESETS: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_DSTATE: tl.constexpr,
):  # fmt: skip
    """dx, this chunk's share dcoef[b, k] (2 N + 1, D) of d decay, d weight, d skip, and the given state's gradient.

    Grid (D / BD, K, B). The shares are summed over b and k by the caller: no atomics, the same bits every time.
    """
    i_d, i_k, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_q = load_rows(decay + o_d * N, 1, m_d, N)
    b_c = load_rows(weight + o_d * N, 1, m_d, N)
    b_skip = tl.load(skip + o_d, mask=m_d)
    b_u = fill(0.0, BD, N)
    b_w = fill(0.0, BD, N)
    b_dc = fill(0.0, BD, N)
    b_dq = fill(0.0, BD, N)
    b_dskip = tl.zeros([BD], tl.float32)
    o_state = i_b.to(tl.int64) * D * N + o_d * N
    if i_k < K - 1:
        p_carry = carry + (i_b * K + i_k + 1).to(tl.int64) * 2 * N * D + o_d
        b_u = load_rows(p_carry, D, m_d, N)
        b_w = load_rows(p_carry + N * D, D, m_d, N)
    length = min(C, T - i_k * C)
    p_start = (i_b.to(tl.int64) * T + i_k * C) * D
    x += p_start + o_d
    dy += p_start + o_d
    dx += p_start + o_d
    p_resets = resets + i_b * G + i_k * (C // GROUP)
    last = (tl.cdiv(length, GROUP) - 1) * GROUP
    whole = length >= last + GROUP
    b_xs = load_rows(x + last * D, D, lanes(o_d, D, whole), GROUP)
    b_dys = load_rows(dy + last * D, D, lanes(o_d, D, whole), GROUP)
    for back in range(0, length, GROUP):
        t = last - back
        earlier = t - GROUP
        byte = reset_byte(p_resets, t // GROUP, HAS_RESETS)
        b_x_now = b_xs
        b_dy_now = b_dys
        b_xs = load_rows(x + earlier * D, D, lanes(o_d, D, earlier >= 0), GROUP)
        b_dys = load_rows(dy + earlier * D, D, lanes(o_d, D, earlier >= 0), GROUP)
        if (byte == 0) & (length >= t + GROUP + HAS_DSTATE):
            for j in tl.static_range(GROUP):
                b_x = b_x_now[GROUP - 1 - j].to(tl.float32)
                b_dy = b_dy_now[GROUP - 1 - j].to(tl.float32)
                b_u, b_w = retreat(b_u, b_w, b_q, b_dy, N)
                p_dx = dx + (t + GROUP - 1 - j) * D
                b_dc, b_dq, b_dskip = collect(b_u, b_w, b_dc, b_dq, b_dskip, b_c, b_skip, b_x, b_dy, p_dx, m_d, N)
        else:
            end = min(t + GROUP, length)
            for i in range(t, end):
                at = t + end - 1 - i
                b_one = tl.load(x + at * D, mask=m_d).to(tl.float32)
                b_dy_one = tl.load(dy + at * D, mask=m_d).to(tl.float32)
                b_u, b_w = retreat(b_u, b_w, b_q, b_dy_one, N)
                is_last = i_k * C + at == T - 1
                b_u = inject(b_u, dstate + o_state, lanes(o_d, D, is_last), N, HAS_DSTATE)
                p_dx_one = dx + at * D
                b_dc, b_dq, b_dskip = collect(
                    b_u, b_w, b_dc, b_dq, b_dskip, b_c, b_skip, b_one, b_dy_one, p_dx_one, m_d, N
                )
                b_u = forget(b_u, (byte >> (at - t)) & 1, N)
                b_w = forget(b_w, (byte >> (at - t)) & 1, N)
    p_dcoef = dcoef + (i_b * K + i_k).to(tl.int64) * (2 * N + 1) * D + o_d
    is_start = HAS_STATE and i_k == 0
    store_shares(b_u, b_w, b_dc, b_dq, b_q, b_c, p_dcoef, state + o_state, dstate_in + o_state, m_d, is_start, D, N)
    tl.store(p_dcoef + 2 * N * D, b_dskip, mask=m_d)
