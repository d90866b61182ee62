"""Losses on the configurator's logits. Each is a sum over tokens, so that micro-batches and ranks add up."""

import torch
from torch import Tensor
from torch.nn import functional as F


def ratio_loss(margin_XM: Tensor, temperature_M: Tensor, fraction_M: Tensor, target: float) -> Tensor:
    """H-Net's ratio loss (Hwang et al. 2025, section 2.3.2) summed over tokens: (M,), or of all layers at once (L, M).

        N / (N - 1) ((N - 1) F G + (1 - F)(1 - G))       N = 1 / target, G the mean of p = sigmoid(margin / temperature)

    fraction_M: F, the share of tokens that were active in the last global batch, no gradient. For each token the loss
    is linear in p: its slope is positive above the target and negative below, for skipped tokens too. At F = G = target
    it is 1, and no pair F = G has less.
    """
    n = 1 / target
    p_XM = torch.sigmoid(margin_XM / temperature_M)
    return (n / (n - 1) * ((n - 1) * fraction_M * p_XM + (1 - fraction_M) * (1 - p_XM))).sum(-2)


def z_loss(margin_XM: Tensor, temperature_M: Tensor) -> Tensor:
    """ST-MoE's router z-loss (Zoph et al. 2022), logsumexp(logits)^2, summed over tokens: (M,) or (L, M).

    Of the tempered logits moved to mean 0, -m/2 and m/2: what both have in common moves no decision.
    """
    half_XM = (margin_XM / temperature_M / 2).abs()
    return (half_XM + F.softplus(-2 * half_XM)).square().sum(-2)
