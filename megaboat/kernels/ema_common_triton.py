"""What both directions of the EMA's device code share. `ema_fwd_triton` and `ema_bwd_triton` hold the kernels.

Two passes in each direction. Rows are cut in chunks of C tokens; the state pass runs every chunk from a zero state at
once, the carry kernel links the chunks, and the last pass runs them again from the state that truly arrives.

The states of a block of channels are a *tuple* of N vectors of BD lanes, rebuilt at each step by a loop that the
compiler unrolls. So a state never leaves its thread: a [BD, N] tile with `tl.sum` compiles to three times the
instructions and two barriers a step, because its layout spreads the N states over lanes. Triton carries tuples through
loops, branches and functions, and to its interpreter they are plain tuples.

A document's first token forgets all states. `resets` holds a byte for each GROUP of 8 tokens, bit j for token j: a
group without a bit takes the unrolled path, any other, and an incomplete one, goes token by token. The passes that
are short of registers read a byte when they come to its group, not a group ahead.

What limits these kernels on Hopper is neither memory nor arithmetic but register ports: a multiply-add that reads two
fresh registers of one bank takes a cycle more, and one with three fresh operands always does. Instructions plus such
conflicts, counted in the machine code, give the measured times within 6 %. D is a constant of the compilation so that
row offsets become immediates; that alone is a tenth of the instructions.

Letters: B rows, T tokens, D channels (BD in a block), N states, C tokens of a chunk, K chunks and G groups of a row.
q decay (D, N), c weight (D, N). Prefixes: i_ program index, o_ offsets, m_ mask, p_ pointer, b_ block in registers.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

GROUP = tl.constexpr(8)  # tokens of an unrolled step: the bits of a byte of `resets`

# Lengths may differ at every call. Triton would compile anew for lengths of 1, multiples of 16 and others, in each of
# the three numbers: up to 27 times half a minute, for nothing.
scan_kernel = triton.jit(do_not_specialize=["T", "K", "G"])


@triton.jit
def load_rows(p_rows, stride, mask, COUNT: tl.constexpr):
    """COUNT vectors, `stride` elements apart, as a tuple. Lanes outside the mask are undefined and never stored."""
    b_rows = ()
    for n in tl.static_range(COUNT):
        b_rows = b_rows + (tl.load(p_rows + n * stride, mask=mask),)
    return b_rows


@triton.jit
def lanes(o_d, D, condition):
    """The mask of lanes that exist, empty unless the scalar condition holds."""
    return o_d < tl.where(condition, D, 0)


@triton.jit
def store_rows(p_rows, stride, b_rows, mask, COUNT: tl.constexpr):
    for n in tl.static_range(COUNT):
        tl.store(p_rows + n * stride, b_rows[n], mask=mask)


@triton.jit
def fill(value, BD: tl.constexpr, COUNT: tl.constexpr):
    b_rows = ()
    for _ in tl.static_range(COUNT):
        b_rows = b_rows + (tl.full([BD], value, tl.float32),)
    return b_rows


@triton.jit
def forget(b_rows, is_first, COUNT: tl.constexpr):
    """Zero where a document begins. A select, not a product: an infinity in document A must not reach document B."""
    b_kept = ()
    for n in tl.static_range(COUNT):
        b_kept = b_kept + (tl.where(is_first != 0, 0.0, b_rows[n]),)
    return b_kept


@triton.jit
def reset_byte(resets, group, HAS_RESETS: tl.constexpr):
    byte = 0
    if HAS_RESETS:
        byte = tl.load(resets + group).to(tl.int32)
    return byte


@triton.jit
def weighted_sum(b_s, b_c, b_y, N: tl.constexpr):
    for n in tl.static_range(N):
        b_y = tl.fma(b_c[n], b_s[n], b_y)
    return b_y


@triton.jit
def sigmoid(b_x):
    """Four instructions fewer than `tl.sigmoid`, whose exp keeps denormal numbers: beside 1 they are nothing."""
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * b_x))


@triton.jit
def chunk_decay(b_q, LOG_C: tl.constexpr):
    """q^C and its derivative C q^(C-1), by squaring: exp2(C log2 q) is off by C * 2^-22, log2 being coarse near 1."""
    b_slope = tl.full(b_q.shape, 1.0, tl.float32)
    for _ in tl.static_range(LOG_C):
        b_slope = 2.0 * b_q * b_slope
        b_q = b_q * b_q
    return b_q, b_slope


@triton.jit
def pack_resets_kernel(first, resets, T, G, BG: tl.constexpr):
    """first (B, T) bool -> resets (B, G) uint8, bit j of byte g for token GROUP * g + j."""
    i_g, i_b = tl.program_id(0), tl.program_id(1)
    o_g = i_g * BG + tl.arange(0, BG)
    o_t = o_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    b_bit = tl.load(first + i_b.to(tl.int64) * T + o_t, mask=o_t < T, other=0).to(tl.int32)
    b_byte = tl.sum((b_bit != 0).to(tl.int32) << tl.arange(0, GROUP)[None, :], axis=1)
    tl.store(resets + i_b * G + o_g, b_byte.to(tl.uint8), mask=o_g < G)
