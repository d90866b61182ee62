"""The norms of the published encoders, and their sinusoid: what a batch of padded sequences needs."""

from typing import Literal

import torch
from torch import Tensor, nn

from megaboat.layers.norm import LayerNorm

Kind = Literal["layer", "scale", "batch"]


class ScaleNorm(nn.Module):
    """g x / sqrt(mean(x^2) + eps) with one number g (Nguyen and Salazar 2019). (..., D) -> (..., D)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * ((x * x).mean(-1, keepdim=True) + 1e-5).rsqrt() * self.weight


class SequenceNorm(nn.Module):
    """A norm of one of three kinds; `batch` is over all tokens but padding of all sequences, channel by channel."""

    def __init__(self, kind: Kind, width: int) -> None:
        super().__init__()
        self.over_batch = kind == "batch"
        kinds = {"layer": LayerNorm, "batch": nn.BatchNorm1d}
        self.norm = ScaleNorm() if kind == "scale" else kinds[kind](width)

    def forward(self, x_BTD: Tensor, kept_BT: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D); with `batch` zero at padding. `kept_BT` is False there."""
        if not self.over_batch:
            return self.norm(x_BTD)
        # Two gathers, for which the host waits once: cuDNN's norm knows no mask.
        return torch.zeros_like(x_BTD).masked_scatter(kept_BT[..., None], self.norm(x_BTD[kept_BT]))


class Sinusoid(nn.Module):
    """x + scale [sin | cos](t / 10000^(2i/D)), with one learned number for scale that starts at D^(-1/2)."""

    frequency_F: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(width**-0.5))
        self.register_buffer("frequency_F", 1e4 ** -(torch.arange(0, width, 2) / width), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        time_T = torch.arange(x_BTD.shape[1], device=x_BTD.device, dtype=self.frequency_F.dtype)
        angle_TF = time_T[:, None] * self.frequency_F
        return x_BTD + self.scale * torch.cat([angle_TF.sin(), angle_TF.cos()], 1)[:, : x_BTD.shape[2]].to(x_BTD.dtype)
