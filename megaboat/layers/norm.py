"""Normalisation over the last dimension, computed in fp32 and returned in the dtype of the input."""

import torch
from torch import Tensor, nn

from megaboat import kernels


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps), with scale and shift unless `affine` is False. (..., D) -> (..., D)."""

    def __init__(self, width: int, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return kernels.layer_norm(x, self.weight, self.bias)


class BranchNorm(LayerNorm):
    """A layer norm where a residual path parts: gives the normalised x, and x for that path."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        with torch.autocast(x.device.type, enabled=False):
            return kernels.branch_norm(x, self.weight, self.bias)
