"""Normalisation over the last dimension, computed in fp32 and returned in the dtype of the input."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-5


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps), with scale and shift unless `affine` is False. (..., D) -> (..., D)."""

    def __init__(self, width: int, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x.to(precise), (self.width,), self.weight, self.bias, EPS).to(x.dtype)
