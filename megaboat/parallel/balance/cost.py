"""What a window costs as a closed form of what it activates, and the same form fitted to measured time.

cost = c0 tokens + c1 active rows + c2 attended pairs, which is exact: a window over active rows is all that attends.
"""

from typing import NamedTuple

import numpy as np

from megaboat.model.config import SeqBoatConfig
from megaboat.model.flops import unit_flops


class WindowCost(NamedTuple):
    """Cost of a window of a fixed number of tokens, as a share of the same window with every token active."""

    base: float
    row: float
    pair: float

    @staticmethod
    def of(model: SeqBoatConfig, tokens: int) -> "WindowCost":
        """By FLOPs. The dense window is one document."""
        unit, inside = unit_flops(model), min(tokens, model.window + 1)
        rows = tokens * model.layers * model.modules
        pairs = (inside * (inside + 1) / 2 + (tokens - inside) * (model.window + 1)) * model.layers * model.modules
        dense = unit.token * tokens + unit.row * rows + unit.pair * pairs
        return WindowCost(unit.token * tokens / dense, unit.row / dense, unit.pair / dense)

    def __call__(self, rows_NLM: np.ndarray, pairs_NLM: np.ndarray) -> np.ndarray:
        """(N,)."""
        return self.base + self.row * rows_NLM.sum((1, 2)) + self.pair * pairs_NLM.sum((1, 2))


class TimeFit(NamedTuple):
    """Seconds = windows x base + rows x row + pairs x pair, and the share of the spread that this explains."""

    base: float
    row: float
    pair: float
    r2: float


def fit_time(windows_S: np.ndarray, rows_S: np.ndarray, pairs_S: np.ndarray, seconds_S: np.ndarray) -> TimeFit:
    """Non-negative least squares over samples S, each the windows, rows, pairs and seconds of a rank in a step.

    Negative coefficients are dropped one by one, so that a short or noisy trace never makes work that costs less than
    nothing.
    """
    columns = np.column_stack([windows_S, rows_S, pairs_S]).astype(float)
    scale = np.maximum(columns.max(0), 1)
    kept, found = [0, 1, 2], np.zeros(3)
    while kept:
        solution = np.linalg.lstsq(columns[:, kept] / scale[kept], seconds_S, rcond=None)[0]
        if (solution >= 0).all():
            found[kept] = solution / scale[kept]
            break
        kept.pop(int(solution.argmin()))
    left = ((seconds_S - columns @ found) ** 2).sum()
    spread = ((seconds_S - seconds_S.mean()) ** 2).sum()
    base, row, pair = found.tolist()
    return TimeFit(base, row, pair, float(1 - left / spread) if spread > 0 else 1.0)
