"""What the configurators did in a step: sums over tokens, kept on the device, added over ranks, read on the host.

Letters: L layers, M modules, X tokens, K bins of a margin histogram.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megaboat.layers.configurator import Routing
from megaboat.parallel.balance.margins import BINS, count_margins, quantile

NEAR = 1e-3
DEAD, SATURATED = 0.005, 0.995
FIGURES = 6


class LayerSums(NamedTuple):
    """Sums over tokens, each (L, M); counts are whole numbers, so that their sum over ranks has no order."""

    margins_LMK: np.ndarray
    """Counts of margins less their threshold: finest where the decision is."""
    active_LM: np.ndarray
    near_LM: np.ndarray
    """Margins within 1e-3 of the threshold: decisions that another rounding would flip."""
    dropped_LM: np.ndarray
    """Tokens over their threshold that a capacity turned away, be it `balance.capacity` or `train.capacity`."""
    span_LM: np.ndarray
    """Tokens from each active one back to the oldest that it attends to."""
    confidence_LM: np.ndarray
    """Of active tokens."""
    entropy_LM: np.ndarray
    """Of the tempered decision, in bits."""
    threshold_LM: np.ndarray
    """What the margins were counted against."""

    @property
    def tokens(self) -> int:
        return int(self.margins_LMK[0, 0].sum())

    def figures(self) -> dict[str, Any]:
        """By name a number for each layer, over its modules: what `metrics.jsonl` says under `layers`."""
        tokens, active_L = max(1, self.tokens), np.maximum(self.active_LM.sum(1), 1)
        quantiles = {f"margin_q{round(100 * q)}": q for q in (0.1, 0.5, 0.9)}
        figures_L = {
            "entropy": self.entropy_LM.mean(1) / tokens,
            "confidence": self.confidence_LM.sum(1) / active_L,
            "near_threshold": self.near_LM.mean(1) / tokens,
            "span": self.span_LM.sum(1) / active_L,
            "dropped": self.dropped_LM.mean(1) / tokens,
            **{name: [quantile(bins, 1 - q) for bins in self.margins_LMK.sum(1)] for name, q in quantiles.items()},
        }
        return {name: [round(float(value), 6) for value in values] for name, values in figures_L.items()}


def sum_layers(routings: list[Routing], threshold_LM: Tensor, cu_seqlens: Tensor, window: int) -> Tensor:
    """One vector of a micro-batch's sums, fp64: counts in it are exact. `read_sums` takes the sum of many apart.

    threshold_LM: margins above it are active, but for those that a capacity turns away.
    """
    active_LXM, margin_LXM, confidence_LXM = (
        torch.stack([getattr(routing, name).detach() for routing in routings])
        for name in ("active_XM", "margin_XM", "confidence_XM")
    )
    temperature_L1M = torch.stack([routing.log_temperature_M for routing in routings])[:, None].exp()
    over_LXM = margin_LXM - threshold_LM[:, None]
    z_LXM = margin_LXM / temperature_L1M
    p_LXM = torch.sigmoid(z_LXM)
    # H(sigmoid(z)) = softplus(-z) + z (1 - sigmoid(z)), stable at both ends.
    entropy_LXM = (F.softplus(-z_LXM) + z_LXM * (1 - p_LXM)) / np.log(2)
    sums = [
        active_LXM.sum(1),
        (over_LXM.abs() < NEAR).sum(1),
        ((over_LXM > 0) & ~active_LXM).sum(1),
        spans(active_LXM, cu_seqlens, window).sum(1),
        confidence_LXM.sum(1),
        entropy_LXM.sum(1),
    ]
    return torch.cat([count_margins(over_LXM).flatten().double(), *(x.double().flatten() for x in sums)])


def read_sums(vector: np.ndarray, threshold_LM: np.ndarray) -> LayerSums:
    """The sums of `sum_layers`' vectors, added; all were made with these thresholds."""
    layers, modules = threshold_LM.shape
    size = layers * modules
    margins, figures = vector[: size * BINS], vector[size * BINS :].reshape(FIGURES, layers, modules)
    counts = margins.reshape(layers, modules, BINS).astype(np.int64)
    active, near, dropped, span, confidence, entropy = figures
    return LayerSums(counts, active, near, dropped, span, confidence, entropy, threshold_LM)


def spans(active_LXM: Tensor, cu_seqlens: Tensor, window: int) -> Tensor:
    """int64 (L, X, M): how many tokens back the oldest token that each active one attends to lies; 0 where inactive.

    No host synchronisation: ranks of active tokens are inverted by a scatter into X + 1 slots.
    """
    L, X, M = active_LXM.shape
    active_LMX = active_LXM.transpose(1, 2)
    token_X = torch.arange(X, device=active_LXM.device)
    count_LMX = active_LMX.long().cumsum(2)
    slot_LMX = torch.where(active_LMX, count_LMX - 1, X)
    token_of_row = token_X.new_zeros(L, M, X + 1).scatter_(2, slot_LMX, token_X.expand(L, M, X))
    before_LMX = F.pad(count_LMX, (1, 0))
    document_X = torch.searchsorted(cu_seqlens.long(), token_X, right=True) - 1
    first_row_LMX = before_LMX[..., cu_seqlens.long()[document_X]]
    oldest_LMX = torch.maximum(count_LMX - 1 - window, first_row_LMX).clamp_min(0)
    span_LMX = torch.where(active_LMX, token_X - token_of_row.gather(2, oldest_LMX), 0)
    return span_LMX.transpose(1, 2)
