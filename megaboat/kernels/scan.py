"""The state of a diagonal linear recurrence at every token, by doubling: no loop over time, no word to the host.

After the pass of lag L a token has summed up the last 2 L tokens of its document, so ceil(log2 T) passes are enough: 11
for 2,048 tokens, each some seven times the size of the states through memory, forward and backward alike.
"""

from typing import Any

import torch
from torch import Tensor


def diagonal_scan(
    u_BTP: Tensor, decay_P: Tensor, first_BT: Tensor | None = None, state_BP: Tensor | None = None
) -> Tensor:
    """`reference.diagonal_recurrence`: h_BTP. Keeps h alone for the backward pass."""
    B, T, _ = u_BTP.shape
    first_BT = torch.zeros(B, T, dtype=torch.bool, device=u_BTP.device) if first_BT is None else first_BT
    if state_BP is not None:
        arriving_BP = (decay_P * state_BP).masked_fill(first_BT[:, 0, None], 0)
        u_BTP = torch.cat([u_BTP[:, :1] + arriving_BP[:, None], u_BTP[:, 1:]], 1)
    return _Scan.apply(u_BTP, decay_P, first_BT)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u_BTP: Tensor, decay_P: Tensor, first_BT: Tensor) -> Tensor:
        h_BTP = _double(u_BTP, decay_P, first_BT)
        ctx.save_for_backward(h_BTP, decay_P, first_BT)
        return h_BTP

    @staticmethod
    def backward(ctx: Any, dh_BTP: Tensor) -> tuple[Tensor, Tensor, None]:
        """The same recurrence from the other side: du_t = dh_t + conj(decay) du_{t+1}, but over no border."""
        h_BTP, decay_P, first_BT = ctx.saved_tensors
        ends_BT = first_BT.roll(-1, 1)
        du_BTP = _double(dh_BTP.flip(1), decay_P.conj().resolve_conj(), ends_BT.flip(1)).flip(1)
        before_BTP = h_BTP[:, :-1].masked_fill(first_BT[:, 1:, None], 0)
        return du_BTP, (du_BTP[:, 1:] * before_BTP.conj()).sum((0, 1)), None


def _double(u_BTP: Tensor, decay_P: Tensor, first_BT: Tensor) -> Tensor:
    """The recurrence from a state of zero. Powers of the decay are squared in double precision: they are as exact as
    the decay, which the last of them holds to the power of T."""
    T = u_BTP.shape[1]
    time_T = torch.arange(T, device=u_BTP.device)
    age_BT = time_T - (time_T * first_BT).cummax(1).values
    h_BTP, power_P, lag = u_BTP.clone(), decay_P.to(torch.complex128), 1
    while lag < T:
        came_BTP = h_BTP[:, :-lag] * power_P.to(u_BTP.dtype)
        h_BTP[:, lag:] += came_BTP.masked_fill_(age_BT[:, lag:, None] < lag, 0)
        power_P, lag = power_P.square(), 2 * lag
    return h_BTP
