"""The damped EMA on GPUs: the launches around `ema_fwd_triton` and `ema_bwd_triton` and their place in autograd."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megaboat.kernels import ema_bwd_triton as bwd
from megaboat.kernels import ema_fwd_triton as fwd
from megaboat.kernels.ema_common_triton import GROUP as _GROUP
from megaboat.kernels.ema_common_triton import pack_resets_kernel
from megaboat.kernels.recompute import offer
from megaboat.kernels.sizes import cdiv

GROUP = _GROUP.value
WARPS = 4
CARRY_LANES = 128
SHORTEST_CHUNK, LONGEST_CHUNK = 64, 1024
_packed = WeakTensorKeyDictionary()
PROGRAMS = 500  # four or so on each of 132 multiprocessors; beyond that longer chunks are better: less carry traffic


def ema_triton(
    x_BTD: Tensor,
    decay_DN: Tensor,
    weight_DN: Tensor,
    skip_D: Tensor,
    first_BT: Tensor | None = None,
    state_BDN: Tensor | None = None,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """`ema.ema` for x in bf16, fp16 or fp32; coefficients and state fp32. Deterministic in both directions.

    Gradients reach x, the coefficients and `state_BDN`, from y and from the returned state. With `silu` a second
    tensor of the size of x is kept for the backward pass.
    """
    return _Ema.apply(x_BTD, decay_DN, weight_DN, skip_D, first_BT, state_BDN, silu)


@dataclass(frozen=True)
class Cut:
    """Sizes of a call, and how one direction cuts it: C tokens a chunk, BD channels a program."""

    B: int
    T: int
    D: int
    N: int
    C: int
    BD: int

    @property
    def K(self) -> int:
        """Chunks of a row."""
        return cdiv(self.T, self.C)

    @property
    def G(self) -> int:
        """Groups of a row."""
        return cdiv(self.T, GROUP)

    def grid(self, chunks: int) -> tuple[int, int, int]:
        return cdiv(self.D, self.BD), chunks, self.B

    @property
    def carry_grid(self) -> tuple[int, int]:
        return cdiv(self.N * self.D, CARRY_LANES), self.B

    @property
    def log_C(self) -> int:
        return self.C.bit_length() - 1


def cut_forward(B: int, T: int, D: int, N: int) -> Cut:
    """Two channels a lane where the 3 N registers of each allow it: wider loads, and two sums that do not wait."""
    return _cut(B, T, D, N, lanes=2 if N <= 16 else 1)


def cut_backward(B: int, T: int, D: int, N: int) -> Cut:
    """One channel a lane: it takes 6 N registers, so that N = 32 just fits."""
    return _cut(B, T, D, N, lanes=1)


def _cut(B: int, T: int, D: int, N: int, lanes: int) -> Cut:
    BD = 32 * WARPS * lanes
    C = LONGEST_CHUNK
    while C > SHORTEST_CHUNK and B * cdiv(D, BD) * cdiv(T, C) < PROGRAMS:
        C //= 2
    return Cut(B, T, D, N, C, BD)


class _Ema(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, decay, weight, skip, first, state, silu):  # type: ignore[no-untyped-def]
        x, decay, weight, skip = x.contiguous(), decay.contiguous(), weight.contiguous(), skip.contiguous()
        state = None if state is None else state.contiguous()
        resets = None if first is None else _resets(first)
        save_pre = silu and any(ctx.needs_input_grad)
        y, pre, state_out = ema_fwd(x, decay, weight, skip, resets, state, silu, save_pre)
        if pre is not None:
            offer(y, lambda: torch.nn.functional.silu(pre))
        ctx.save_for_backward(x, decay, weight, skip, resets, state, pre)
        ctx.set_materialize_grads(False)
        return y, state_out

    @staticmethod
    def backward(ctx, dy, dstate_out):  # type: ignore[no-untyped-def]
        x, decay, weight, skip, resets, state, pre = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        dx, ddecay, dweight, dskip, dstate = ema_bwd(x, dy, pre, decay, weight, skip, resets, state, None)
        if dstate_out is not None:
            # The returned state bypasses the weights. The scan is linear, so its share is a run of its own with weight
            # one, nothing from y, and that gradient as the adjoint of the last state. Rare, so it may cost double.
            one, zero = torch.ones_like(weight), torch.zeros_like(skip)
            more = ema_bwd(x, torch.zeros_like(x), None, decay, one, zero, resets, state, dstate_out.contiguous())
            dx, ddecay = dx + more[0], ddecay + more[1]
            dstate = None if dstate is None or more[4] is None else dstate + more[4]
        return dx, ddecay, dweight, dskip, None, dstate, None


def _resets(first: Tensor) -> Tensor:
    """`_pack_resets`, once for all layers."""
    found = _packed.get(first)
    if found is None or found[0] != first._version:
        found = _packed[first] = first._version, _pack_resets(first.contiguous())
    return found[1]


def _pack_resets(first: Tensor) -> Tensor:
    """(B, T) bool -> (B, T / GROUP) uint8, a bit for each token."""
    B, T = first.shape
    G, BG = cdiv(T, GROUP), 128
    resets = torch.empty(B, G, dtype=torch.uint8, device=first.device)
    pack_resets_kernel[(cdiv(G, BG), B)](first, resets, T, G, BG)
    return resets


def ema_fwd(
    x: Tensor,
    decay: Tensor,
    weight: Tensor,
    skip: Tensor,
    resets: Tensor | None,
    state: Tensor | None,
    silu: bool,
    save_pre: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, y before SiLU if asked for, and the state after each row."""
    (B, T, D), N = x.shape, decay.shape[1]
    cut = cut_forward(B, T, D, N)
    K, G, C, BD = cut.K, cut.G, cut.C, cut.BD
    y = torch.empty_like(x)
    pre = torch.empty_like(x) if save_pre else None
    state_out = x.new_empty(B, D, N, dtype=torch.float32)
    carry = x.new_empty(B, K, N, D, dtype=torch.float32)  # state after each chunk
    broken = x.new_empty(B, K, dtype=torch.uint8)
    has_resets, has_state = resets is not None, state is not None
    # Absent tensors are passed as some other one: constexpr flags keep the kernels from looking at them.
    resets, state = broken if resets is None else resets, decay if state is None else state
    if K > 1:
        # Half the warps a program: what documents leave of this pass spreads more evenly.
        fwd.ema_fwd_state_kernel[(cdiv(D, BD // 2), K - 1, B)](
            x, decay, resets, carry, broken, T, K, G, D, N, C, BD // 2, has_resets, num_warps=WARPS // 2
        )
        fwd.ema_fwd_carry_kernel[cut.carry_grid](
            decay, state, carry, broken, K, D, N, cut.log_C, CARRY_LANES, has_state, has_resets, num_warps=1
        )
    fwd.ema_fwd_output_kernel[cut.grid(K)](
        x, decay, weight, skip, resets, state, carry, y, y if pre is None else pre, state_out, T, K, G,
        D, N, C, BD, has_resets, has_state, silu, save_pre, num_warps=WARPS,
    )  # fmt: skip
    return y, pre, state_out


def ema_bwd(
    x: Tensor,
    dy: Tensor,
    pre: Tensor | None,
    decay: Tensor,
    weight: Tensor,
    skip: Tensor,
    resets: Tensor | None,
    state: Tensor | None,
    dstate_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, decay, weight, skip and the given state; `pre` if y went through SiLU."""
    (B, T, D), N = x.shape, decay.shape[1]
    cut = cut_backward(B, T, D, N)
    K, G, C, BD = cut.K, cut.G, cut.C, cut.BD
    dx = torch.empty_like(x)
    dcoef = x.new_empty(B * K, 2 * N + 1, D, dtype=torch.float32)
    dstate = None if state is None else torch.empty_like(state)
    carry = x.new_empty(B, K, 2, N, D, dtype=torch.float32)  # u and w after each chunk
    broken = x.new_empty(B, K, dtype=torch.uint8)
    has_resets, has_state, has_dstate, silu = (given is not None for given in (resets, state, dstate_out, pre))
    resets, pre = broken if resets is None else resets, dy if pre is None else pre
    dstate_out = decay if dstate_out is None else dstate_out
    dpre = torch.empty_like(dy) if silu else dy
    if K > 1 or silu:
        bwd.ema_bwd_state_kernel[cut.grid(K if silu else K - 1)](
            dy, pre, dpre, decay, resets, dstate_out, carry, broken, T, K, G,
            D, N, C, BD, has_resets, has_dstate, silu, num_warps=WARPS,
        )  # fmt: skip
    if K > 1:
        bwd.ema_bwd_carry_kernel[cut.carry_grid](
            decay, carry, broken, K, D, N, cut.log_C, CARRY_LANES, has_resets, num_warps=1
        )
    bwd.ema_bwd_input_kernel[cut.grid(K)](
        x, dpre, decay, weight, skip, resets, decay if state is None else state, carry, dstate_out,
        dx, dcoef, decay if dstate is None else dstate, T, K, G,
        D, N, C, BD, has_resets, has_state, has_dstate, num_warps=WARPS,
    )  # fmt: skip
    ddecay, dweight, dskip = dcoef.sum(0).split([N, N, 1])
    return dx, ddecay.T, dweight.T, dskip[0], dstate
