"""Forward pass of the EMA on the device; `ema_common_triton` explains the manner and the letters."""

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
def advance(b_s, b_q, b_x, N: tl.constexpr):
    """s = q s + x."""
    b_next = ()
    for n in tl.static_range(N):
        b_next = b_next + (tl.fma(b_q[n], b_s[n], b_x),)
    return b_next


@triton.jit
def store_output(y, pre, offset, b_y, mask, SILU: tl.constexpr, SAVE_PRE: tl.constexpr):
    if SAVE_PRE:
        tl.store(pre + offset, b_y.to(pre.dtype.element_ty), mask=mask)
    if SILU:
        b_y = b_y.to(y.dtype.element_ty).to(tl.float32)  # so that y comes back from what is kept
        b_y = b_y * sigmoid(b_y)
    tl.store(y + offset, b_y.to(y.dtype.element_ty), mask=mask)


@scan_kernel
def ema_fwd_state_kernel(
    x, decay, resets, carry, broken, T, K, G,
    D: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, HAS_RESETS: tl.constexpr,
):  # fmt: skip
    """carry[b, k] (N, D): the state after chunk k had it started from zero; broken[b, k]: a document begins in it.

    Grid (D / BD, K - 1, B): the last chunk hands its state to no other chunk, so every chunk here is full. Tokens
    before the chunk's last new document, and all of them where the next chunk begins with one, leave no state.
    """
    i_d, i_k, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_q = load_rows(decay + o_d * N, 1, m_d, N)
    b_s = fill(0.0, BD, N)
    p_x = x + (i_b.to(tl.int64) * T + i_k * C) * D + o_d
    p_resets = resets + i_b * G + i_k * (C // GROUP)
    begin = 0
    if HAS_RESETS:
        o_g = tl.arange(0, C // GROUP)
        b_bytes = tl.load(p_resets + o_g).to(tl.int32)
        if i_d == 0:
            tl.store(broken + i_b * K + i_k, (tl.max(b_bytes, axis=0) != 0).to(tl.uint8))
        forgotten = tl.load(p_resets + C // GROUP).to(tl.int32) & 1
        begin = tl.where(forgotten != 0, C, GROUP * tl.max(tl.where(b_bytes != 0, o_g, 0), axis=0))
    b_rows = load_rows(p_x + begin * D, D, lanes(o_d, D, begin < C), GROUP)
    byte_next = reset_byte(p_resets, tl.minimum(begin, C - GROUP) // GROUP, HAS_RESETS)
    for t in range(begin, C, GROUP):
        # The next group's rows and resets are asked for before this group's arithmetic, which hides their latency.
        byte = byte_next
        byte_next = reset_byte(p_resets, tl.minimum(t + GROUP, C - GROUP) // GROUP, HAS_RESETS)
        b_now = b_rows
        b_rows = load_rows(p_x + (t + GROUP) * D, D, lanes(o_d, D, t + GROUP < C), GROUP)
        if byte == 0:
            for j in tl.static_range(GROUP):
                b_s = advance(b_s, b_q, b_now[j].to(tl.float32), N)
        else:
            for i in range(GROUP):
                b_s = forget(b_s, (byte >> i) & 1, N)
                b_s = advance(b_s, b_q, tl.load(p_x + (t + i) * D, mask=m_d).to(tl.float32), N)
    store_rows(carry + (i_b * K + i_k).to(tl.int64) * N * D + o_d, D, b_s, m_d, N)


@scan_kernel
def ema_fwd_carry_kernel(
    decay, state, carry, broken, K,
    D: tl.constexpr, N: tl.constexpr, LOG_C: tl.constexpr, BE: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_RESETS: tl.constexpr,
):  # fmt: skip
    """Links the chunks in place: carry[b, k] becomes the true state after chunk k. Grid (N * D / BE, B)."""
    i_e, i_b = tl.program_id(0), tl.program_id(1)
    o_e = i_e * BE + tl.arange(0, BE)  # element n * D + d
    m_e = o_e < N * D
    o_dn = (o_e % D) * N + o_e // D
    b_decay, _ = chunk_decay(tl.load(decay + o_dn, mask=m_e, other=0.0), LOG_C)
    b_h = tl.zeros([BE], tl.float32)
    if HAS_STATE:
        b_h = tl.load(state + i_b.to(tl.int64) * D * N + o_dn, mask=m_e)
    stride = N * D
    p_carry = carry + i_b.to(tl.int64) * K * stride + o_e
    for k in range(0, K - 1, GROUP):
        # Loads first, stores last: with both in one loop each load would wait for the store before it.
        b_all = ()
        for j in tl.static_range(GROUP):
            b_all = b_all + (tl.load(p_carry + (k + j) * stride, mask=lanes(o_e, N * D, k + j < K - 1)),)
        for j in tl.static_range(GROUP):
            if HAS_RESETS:
                cut = tl.load(broken + i_b * K + k + j, mask=k + j < K - 1, other=0)
                b_h = tl.where(cut != 0, 0.0, b_h)
            b_h = tl.fma(b_decay, b_h, b_all[j])
            tl.store(p_carry + (k + j) * stride, b_h, mask=lanes(o_e, N * D, k + j < K - 1))


@triton.jit
def output_group(
    b_s, b_q, b_c, b_skip, b_rows, y, pre, t, o_d, m_d,
    D: tl.constexpr, N: tl.constexpr, SILU: tl.constexpr, SAVE_PRE: tl.constexpr,
):  # fmt: skip
    """Store the outputs of GROUP tokens from t on, in which no document begins. Returns the state after them.

    `advance` and `weighted_sum` in one loop: ptxas then needs 128 registers for the kernel instead of 151.
    """
    for j in tl.static_range(GROUP):
        b_x = b_rows[j].to(tl.float32)
        b_y = b_skip * b_x
        b_next = ()
        for n in tl.static_range(N):
            b_n = tl.fma(b_q[n], b_s[n], b_x)
            b_next = b_next + (b_n,)
            b_y = tl.fma(b_c[n], b_n, b_y)
        b_s = b_next
        store_output(y, pre, (t + j) * D + o_d, b_y, m_d, SILU, SAVE_PRE)
    return b_s


@scan_kernel
def ema_fwd_output_kernel(
    x, decay, weight, skip, resets, state, carry, y, pre, state_out, T, K, G,
    D: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    HAS_RESETS: tl.constexpr, HAS_STATE: tl.constexpr, SILU: tl.constexpr, SAVE_PRE: tl.constexpr,
):  # fmt: skip
    """y, before SiLU also `pre` if wanted for the backward pass, and the state after each row. Grid (D / BD, K, B)."""
    i_d, i_k, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_q = load_rows(decay + o_d * N, 1, m_d, N)
    b_c = load_rows(weight + o_d * N, 1, m_d, N)
    b_skip = tl.load(skip + o_d, mask=m_d)
    b_s = fill(0.0, BD, N)
    o_state = i_b.to(tl.int64) * D * N + o_d * N
    if i_k > 0:
        b_s = load_rows(carry + (i_b * K + i_k - 1).to(tl.int64) * N * D + o_d, D, m_d, N)
    elif HAS_STATE:
        b_s = load_rows(state + o_state, 1, m_d, N)
    length = min(C, T - i_k * C)
    p_start = (i_b.to(tl.int64) * T + i_k * C) * D
    p_x = x + p_start + o_d
    y += p_start
    pre += p_start
    p_resets = resets + i_b * G + i_k * (C // GROUP)
    b_rows = load_rows(p_x, D, lanes(o_d, D, length >= GROUP), GROUP)
    for t in range(0, length, GROUP):
        byte = reset_byte(p_resets, t // GROUP, HAS_RESETS)
        b_now = b_rows
        b_rows = load_rows(p_x + (t + GROUP) * D, D, lanes(o_d, D, length >= t + 2 * GROUP), GROUP)
        if (byte == 0) & (length >= t + GROUP):
            b_s = output_group(b_s, b_q, b_c, b_skip, b_now, y, pre, t, o_d, m_d, D, N, SILU, SAVE_PRE)
        else:
            for i in range(t, min(t + GROUP, length)):
                b_s = forget(b_s, (byte >> (i - t)) & 1, N)
                b_one = tl.load(p_x + i * D, mask=m_d).to(tl.float32)
                b_s = advance(b_s, b_q, b_one, N)
                b_out = weighted_sum(b_s, b_c, b_skip * b_one, N)
                store_output(y, pre, i * D + o_d, b_out, m_d, SILU, SAVE_PRE)
    if i_k == K - 1:
        store_rows(state_out + o_state, 1, b_s, m_d, N)
