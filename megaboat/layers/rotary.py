"""Rotary position embedding (RoPE, Su et al. 2021) at original positions: rows keep the phase of their token."""

import torch
from torch import Tensor


def rotate(x_RGZ: Tensor, positions_R: Tensor, base: float = 10000.0) -> Tensor:
    """Turn each pair (2i, 2i+1) of the last dimension by position * base^(-2i/Z).

    The angle is computed in fp64: at position 10^6 an fp32 product would be off by 0.06 radians.
    """
    Z = x_RGZ.shape[-1]
    frequency = base ** (-torch.arange(0, Z, 2, device=x_RGZ.device, dtype=torch.float64) / Z)
    angle = positions_R.double()[:, None, None] * frequency
    precise = torch.promote_types(x_RGZ.dtype, torch.float32)
    cos, sin = angle.cos().to(precise), angle.sin().to(precise)
    even, odd = x_RGZ.to(precise).unflatten(-1, (Z // 2, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x_RGZ.dtype)
