"""Layer normalisation: fp32 inside, the input's dtype outside."""

import torch
from torch import Tensor

from megaboat.kernels.recompute import later, offer

EPS = 1e-5


def branch_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """`layer_norm(x)` and x itself. Who goes on with that x has the two gradients of x added in one pass."""
    normal, branch = _branch_norm(x, weight_D, bias_D, eps)
    again, weight, bias = later(x), weight_D.detach(), bias_D.detach()  # ZeRO-3 may have taken the parameters back
    offer(normal, lambda: layer_norm(again(), weight, bias, eps))
    return normal, branch


def _branch_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.is_cuda and x.dtype != torch.float64:
        from megaboat.kernels.norm_triton import branch_norm_triton

        return branch_norm_triton(x, weight_D, bias_D, eps)
    return layer_norm(x, weight_D, bias_D, eps), x


def layer_norm(x: Tensor, weight_D: Tensor | None = None, bias_D: Tensor | None = None, eps: float = EPS) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last dimension, then scale and shift where given; the dtype of x."""
    if x.is_cuda and x.dtype != torch.float64:
        from megaboat.kernels.norm_triton import layer_norm_triton

        return layer_norm_triton(x, weight_D, bias_D, eps)
    precise = torch.promote_types(x.dtype, torch.float32)
    return torch.nn.functional.layer_norm(x.to(precise), x.shape[-1:], weight_D, bias_D, eps).to(x.dtype)
