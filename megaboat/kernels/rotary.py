"""Queries or keys of every head from one z: scale, shift, and rotate by position (RoPE, Su et al. 2021)."""

import math
from functools import cache

import torch
from torch import Tensor


def rotary_heads(z_RZ: Tensor, scale_GZ: Tensor, bias_GZ: Tensor, positions_R: Tensor, base: float) -> Tensor:
    """rotate(z * scale_g + bias_g) for each head g: (R, G, Z) in the dtype of z. Rows keep the phase of their token."""
    if z_RZ.is_cuda and z_RZ.dtype != torch.float64:
        from megaboat.kernels.rotary_triton import rotary_heads_triton

        return rotary_heads_triton(z_RZ, scale_GZ, bias_GZ, positions_R, turns(z_RZ.shape[-1], base, z_RZ.device))
    return rotate(z_RZ[:, None] * scale_GZ.to(z_RZ.dtype) + bias_GZ.to(z_RZ.dtype), positions_R, base)


def rotary_pair(
    z_RY: Tensor, query_2GZ: tuple[Tensor, Tensor], key_2GZ: tuple[Tensor, Tensor], positions_R: Tensor, base: float
) -> tuple[Tensor, Tensor]:
    """`rotary_heads` by scale and bias of the queries, and by those of the keys: (R, G, Z) each.

    Y: Z, or 2 Z with the z of the queries first and that of the keys beside it.
    """
    Z = query_2GZ[0].shape[-1]
    if z_RY.is_cuda and z_RY.dtype != torch.float64:
        from megaboat.kernels.rotary_triton import rotary_pair_triton

        return rotary_pair_triton(z_RY, query_2GZ, key_2GZ, positions_R, turns(Z, base, z_RY.device))
    q_RGZ = rotary_heads(z_RY[:, :Z], *query_2GZ, positions_R, base)
    return q_RGZ, rotary_heads(z_RY[:, -Z:], *key_2GZ, positions_R, base)


def rotate(x_RGZ: Tensor, positions_R: Tensor, base: float = 10000.0) -> Tensor:
    """Turn each pair (2i, 2i+1) of the last dimension by position * base^(-2i/Z).

    The angle is computed in fp64: at position 10^6 an fp32 product would be off by 0.06 radians.
    """
    Z = x_RGZ.shape[-1]
    angle = positions_R.double()[:, None, None] * (math.tau * turns(Z, base, x_RGZ.device))
    precise = torch.promote_types(x_RGZ.dtype, torch.float32)
    cos, sin = angle.cos().to(precise), angle.sin().to(precise)
    even, odd = x_RGZ.to(precise).unflatten(-1, (Z // 2, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x_RGZ.dtype)


@cache
def turns(Z: int, base: float, device: torch.device) -> Tensor:
    """Turns a position of each pair of Z dimensions, (Z / 2,) fp64."""
    return base ** (-torch.arange(0, Z, 2, device=device, dtype=torch.float64) / Z) / math.tau
