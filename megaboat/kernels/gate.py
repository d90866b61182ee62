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


Map = tuple[Tensor, Tensor]
"""Weight (E, D) and bias (E,) of a linear map."""


def silu_maps(x_XD: Tensor, first: Map, second: Map, plain: Map) -> tuple[Tensor, Tensor, Tensor]:
    """SiLU of two linear maps of x, and a third map by itself: (X, E) each. On GPUs the third's rows may lie apart."""
    maps = (first, second, plain)
    if mixes(x_XD, first[0]):
        from megaboat.kernels.gate_triton import silu_parts_triton

        widths = [bias.shape[0] for _, bias in maps]
        product = joint_linear(x_XD, [weight for weight, _ in maps], [bias for _, bias in maps])
        parts, again = silu_parts_triton(product, widths), later(product)
        offer(parts[0], lambda: silu_parts_triton(again(), widths)[0])
        return parts
    a, b, c = (linear(x_XD, weight, bias) for weight, bias in maps)
    return silu(a), torch.nn.functional.silu(b), c
