"""SiLU gates: SiLU(a) b without keeping SiLU(a)."""

import torch
from torch import Tensor

from megaboat.kernels.linear import joint_linear, linear, mixes
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


def swiglu(x: Tensor, gate_FD: Tensor, up_FD: Tensor) -> Tensor:
    """SiLU(gate x) * up x by two linear maps: (..., D) -> (..., F)."""
    if mixes(x, gate_FD):
        from megaboat.kernels.gate_triton import silu_halves_triton

        product = joint_linear(x, [gate_FD, up_FD])
        out, again = silu_halves_triton(product), later(product)
        offer(out, lambda: silu_halves_triton(again()))
        return out
    return silu_gate(linear(x, gate_FD), linear(x, up_FD))
