"""The damped EMA: one signature, the fastest implementation that the device has.

The chunked form here is plain torch and serves CPUs; its matrix products follow from unrolling the recurrence:
inside a piece of at most C tokens of one document, y_t = sum_l K[t-l] x_l + sum_n weight_n decay_n^(t+1) s_in,n with
the kernel K[l] = sum_n weight_n decay_n^l. Pieces start at document borders, so nothing needs a mask.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 32  # C multiply-adds a token in one product against a longer carry loop; 32 was fastest on x86 at D = 256
LONG_CHUNK = 128  # where each step of that loop costs launches, not work


def ema(
    x_BTD: Tensor,
    decay_DN: Tensor,
    weight_DN: Tensor,
    skip_D: Tensor,
    first_BT: Tensor | None = None,
    state_BDN: Tensor | None = None,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """`reference.ema_recurrence`, then SiLU if `silu`; x_BTD may be bf16, state and coefficients are fp32 or fp64.

    Returns y_BTD in the dtype of x_BTD and the state after each row's last token, (B, D, N). Complex coefficients have
    no kernel of their own: plain torch on GPUs too, where the host waits several times a layer.
    """
    if x_BTD.is_cuda and x_BTD.shape[1] > 0 and decay_DN.dtype == torch.float32 and x_BTD.dtype != torch.float64:
        from megaboat.kernels.ema_triton import ema_triton  # triton comes with CUDA builds of torch only

        return ema_triton(x_BTD, decay_DN, weight_DN, skip_D, first_BT, state_BDN, silu)
    chunk = LONG_CHUNK if x_BTD.is_cuda else CHUNK
    precise_BTD = x_BTD.to(decay_DN.dtype.to_real())
    y_BTD, state_BDN = ema_chunked(precise_BTD, decay_DN, weight_DN, skip_D, first_BT, state_BDN, chunk)
    y_BTD = y_BTD.to(x_BTD.dtype)
    return (torch.nn.functional.silu(y_BTD) if silu else y_BTD), state_BDN


def ema_chunked(
    x_BTD: Tensor,
    decay_DN: Tensor,
    weight_DN: Tensor,
    skip_D: Tensor,
    first_BT: Tensor | None = None,
    state_BDN: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """`reference.ema_recurrence` by pieces: three matrix products, and a loop over a row's pieces for the carry."""
    B, T, D = x_BTD.shape
    N = decay_DN.shape[1]
    if state_BDN is None:
        state_BDN = decay_DN.new_zeros(B, D, N)
    pieces = _cut(B, T, first_BT, chunk, x_BTD.device)
    lags = torch.arange(chunk + 1, device=x_BTD.device, dtype=x_BTD.dtype)
    power_DNC = torch.exp(_log(decay_DN)[..., None] * lags)  # decay^0 .. decay^C
    kernel_DC = torch.einsum("dn,dnc->dc", weight_DN, power_DNC[..., :chunk]).real

    x_XD = x_BTD.reshape(B * T, D)
    y_DCP = _toeplitz(kernel_DC) @ _gather(x_XD, pieces.from_start)
    sum_DNP = power_DNC[..., :chunk].flip(-1) @ _gather(x_XD, pieces.from_end).to(power_DNC.dtype)
    arriving_PDN, state_BDN = _carry(sum_DNP.permute(2, 0, 1), power_DNC, pieces, state_BDN)
    kept_DCP = (weight_DN[..., None] * power_DNC[..., 1:]).transpose(1, 2) @ arriving_PDN.permute(1, 2, 0)
    y_DCP = y_DCP + kept_DCP.real
    y_XD = y_DCP.permute(2, 1, 0).reshape(-1, D)[pieces.slot_X]
    return y_XD.view(B, T, D) + skip_D * x_BTD, state_BDN


def _log(decay_DN: Tensor) -> Tensor:
    """Of a decay that may have become 0, where it is real."""
    return decay_DN.log() if decay_DN.is_complex() else decay_DN.clamp_min(torch.finfo(decay_DN.dtype).tiny).log()


@dataclass(frozen=True)
class _Pieces:
    """P pieces of at most C tokens, none across a document border, in the order of the flattened tokens."""

    from_start: Tensor  # (P, C) token in each slot, pieces flush left; -1: empty
    from_end: Tensor  # (P, C) the same, pieces flush right
    slot_X: Tensor  # (B * T,) where a token lies in the flattened `from_start`
    length_P: Tensor
    rank_P: Tensor  # 0 for a piece that opens a document or a row, then 1, 2, ...
    continues_P: Tensor  # the row whose incoming state the piece continues; -1: none
    last_B: Tensor  # the last piece of each row


def _cut(B: int, T: int, first_BT: Tensor | None, chunk: int, device: torch.device) -> _Pieces:
    first_BT = torch.zeros(B, T, dtype=torch.bool, device=device) if first_BT is None else first_BT
    opens_BT = first_BT.clone()
    opens_BT[:, 0] = True
    time_X = torch.arange(B * T, device=device)
    opened_X = torch.where(opens_BT.flatten(), time_X, 0).cummax(0).values
    age_X = time_X - opened_X
    start_P = (age_X % chunk == 0).nonzero().flatten()
    piece_X = (age_X % chunk == 0).cumsum(0) - 1
    length_P = torch.diff(start_P, append=start_P.new_tensor([B * T]))
    slots = torch.arange(chunk, device=device)
    from_start = torch.where(slots < length_P[:, None], start_P[:, None] + slots, -1)
    late = slots - (chunk - length_P[:, None])
    from_end = torch.where(late >= 0, start_P[:, None] + late, -1)
    row_P = start_P // T
    continues_P = torch.where((start_P % T == 0) & ~first_BT.flatten()[start_P], row_P, -1)
    last_B = torch.searchsorted(start_P, torch.arange(1, B + 1, device=device) * T) - 1
    return _Pieces(
        from_start,
        from_end,
        piece_X * chunk + age_X % chunk,
        length_P,
        age_X[start_P] // chunk,
        continues_P,
        last_B,
    )


def _gather(x_XD: Tensor, index_PC: Tensor) -> Tensor:
    """(D, C, P), zeros in empty slots."""
    x_PCD = x_XD[index_PC.clamp_min(0)] * (index_PC >= 0)[..., None]
    return x_PCD.permute(2, 1, 0)


def _toeplitz(kernel_DC: Tensor) -> Tensor:
    """Lower-triangular (D, C, C) with kernel[t - l] at row t, column l."""
    C = kernel_DC.shape[1]
    lag = torch.arange(C, device=kernel_DC.device)
    lag = lag[:, None] - lag
    return kernel_DC[:, lag.clamp_min(0)] * (lag >= 0)


def _carry(sum_PDN: Tensor, power_DNC: Tensor, pieces: _Pieces, state_BDN: Tensor) -> tuple[Tensor, Tensor]:
    """The state that each piece starts from, (P, D, N), and the state after each row's last piece."""
    decay_PDN = power_DNC[..., pieces.length_P].permute(2, 0, 1)
    opening = (pieces.rank_P == 0).nonzero().flatten()
    row = pieces.continues_P[opening]
    arriving = [state_BDN[row.clamp_min(0)] * (row >= 0)[:, None, None]]
    order = [opening]
    for rank in range(1, int(pieces.rank_P.max()) + 1):
        following = (pieces.rank_P == rank).nonzero().flatten()
        before = following - 1
        came = arriving[-1][torch.searchsorted(order[-1], before)]
        arriving.append(decay_PDN[before] * came + sum_PDN[before])
        order.append(following)
    arriving_PDN = torch.cat(arriving)[torch.cat(order).argsort()]
    last = pieces.last_B
    return arriving_PDN, decay_PDN[last] * arriving_PDN[last] + sum_PDN[last]
