"""SiLU gates: SiLU(a) b without keeping SiLU(a)."""

import torch
from torch import Tensor

from megaboat.kernels.recompute import later, offer


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    out, again = torch.nn.functional.silu(x), later(x)
    offer(out, lambda: torch.nn.functional.silu(again()))
    return out


def silu_gate(a: Tensor, b: Tensor) -> Tensor:
    """SiLU(a) * b, elementwise over equal shapes and dtypes."""
    out, again_a, again_b = _silu_gate(a, b), later(a), later(b)
    offer(out, lambda: _silu_gate(again_a(), again_b()))
    return out


def _silu_gate(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda and a.dtype != torch.float64:
        from megaboat.kernels.gate_triton import silu_gate_triton

        return silu_gate_triton(a, b)
    return torch.nn.functional.silu(a) * b
