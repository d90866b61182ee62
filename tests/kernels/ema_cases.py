"""Inputs and the plain form of the EMA for its tests."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megaboat.kernels import reference

COEFFICIENTS = frozenset({"decay_DN", "weight_DN", "skip_D", "state_BDN"})


@dataclass
class EmaCase:
    inputs: dict[str, Tensor]
    first_BT: Tensor | None
    cotangents: list[Tensor | None]


def ema_case(
    B: int, T: int, D: int, N: int, resets: bool = False, state: bool = False, dstate: bool = False
) -> EmaCase:
    """Decays from 1e-6 over 0.5 to 0.9999, resets at the very first and last token, a chunk's first, and at random."""
    decay_DN = 1 - 10 ** -(4 * torch.rand(D, N, dtype=torch.float64))
    decay_DN[0, 0] = 1e-6
    inputs = {
        "x_BTD": torch.randn(B, T, D, dtype=torch.float64),
        "decay_DN": decay_DN,
        "weight_DN": torch.randn(D, N, dtype=torch.float64),
        "skip_D": torch.randn(D, dtype=torch.float64),
    }
    if state:
        inputs["state_BDN"] = torch.randn(B, D, N, dtype=torch.float64)
    first_BT = None
    if resets:
        first_BT = torch.rand(B, T) < 0.02
        first_BT[0, 0] = first_BT[-1, -1] = first_BT[-1, 128 % T] = True
    cotangents = [torch.randn(B, T, D), torch.randn(B, D, N) if dstate else None]
    return EmaCase(inputs, first_BT, cotangents)


def plain(silu: bool, first_BT: Tensor | None):  # type: ignore[no-untyped-def]
    """The recurrence in the dtype of the coefficients, rounded to the dtype of x as `ema` does."""

    def run(x_BTD: Tensor, decay_DN: Tensor, **others: Tensor) -> tuple[Tensor, Tensor]:
        y_BTD, state_BDN = reference.ema_recurrence(x_BTD.to(decay_DN.dtype), decay_DN, first_BT=first_BT, **others)
        y_BTD = y_BTD.to(x_BTD.dtype)
        return (torch.nn.functional.silu(y_BTD) if silu else y_BTD), state_BDN

    return run
