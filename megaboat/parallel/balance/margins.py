"""Histograms of margins: integer counts, so that sums over ranks are exact in any order, and quantiles of them.

A margin is the logit of activating minus that of skipping. 512 bins, even in asinh(margin / 0.05): 0.4 % of a margin's
range near 0, 4 % of the margin itself far out, and 0 is a border, so that the sign is never lost. Beyond +-1000 the
outermost bins take all.
"""

import math

import numpy as np
import torch
from torch import Tensor

BINS = 512
_SCALE, _LARGEST = 0.05, 1000.0
_STRETCH = BINS / 2 / math.asinh(_LARGEST / _SCALE)

EDGES = _SCALE * np.sinh(np.arange(-BINS // 2, BINS // 2 + 1) / _STRETCH)
"""(513,) borders of the bins, ascending."""


def count_margins(margin_LXM: Tensor) -> Tensor:
    """int64 (L, M, 512): how many of the X tokens' margins fall into each bin. No host synchronisation."""
    L, X, M = margin_LXM.shape
    bin_LXM = (torch.asinh(margin_LXM / _SCALE) * _STRETCH).floor().long().add_(BINS // 2).clamp_(0, BINS - 1)
    counts_LMK = torch.zeros(L, M, BINS, dtype=torch.int64, device=margin_LXM.device)
    return counts_LMK.scatter_add_(2, bin_LXM.transpose(1, 2), torch.ones_like(bin_LXM).transpose(1, 2))


def quantile(counts_K: np.ndarray, share: float) -> float:
    """The margin that `share` of the counted tokens exceed, linear inside a bin. All counts 0: 0."""
    total = counts_K.sum()
    if total == 0:
        return 0.0
    below = (1 - share) * total
    reached_K = np.cumsum(counts_K)
    k = min(int(np.searchsorted(reached_K, below)), len(counts_K) - 1)
    before = reached_K[k] - counts_K[k]
    inside = (below - before) / counts_K[k] if counts_K[k] else 0.0
    return float(EDGES[k] + inside * (EDGES[k + 1] - EDGES[k]))
