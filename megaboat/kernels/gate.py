"""SiLU gates: SiLU(a) b without keeping SiLU(a)."""

import torch
from torch import Tensor


def silu_gate(a: Tensor, b: Tensor) -> Tensor:
    """SiLU(a) * b, elementwise over equal shapes and dtypes."""
    if a.is_cuda and a.dtype != torch.float64:
        from megaboat.kernels.gate_triton import silu_gate_triton

        return silu_gate_triton(a, b)
    return torch.nn.functional.silu(a) * b
