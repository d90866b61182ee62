"""What a window will cost, before it is read by the model: the mean of its domain, and how it differs from it.

The state is a pure function of the records it was given, in order of their windows: the same at every number of ranks.

Letters: N windows, K domains, F features.
"""

from typing import Any

import numpy as np

DECAY = 0.99  # a window: the past of a domain counts by about its last hundred windows
MIN_R2 = 0.1  # the regression is used only while it explains this share of the spread inside domains
RIDGE = 1e-2
FEATURES = 4


def features_of(tokens_NT: np.ndarray, documents_N: np.ndarray) -> np.ndarray:
    """(N, F) cheap figures of windows of tokens: how varied, how repetitive, how rare their tokens are, how many
    documents begin in them. Tokenizers number their tokens by frequency, roughly: hence the third."""
    short = tokens_NT.itemsize == 2  # then half of the bytes are sorted, in half of the time
    firsts_NT = tokens_NT[:, :-1].astype(np.uint32) << 16 if short else tokens_NT[:, :-1].astype(np.int64) << 32
    pairs_NT = firsts_NT | tokens_NT[:, 1:]
    varied_N, repetitive_N = (_distinct(values) / tokens_NT.shape[1] for values in (tokens_NT, pairs_NT))
    rarity_N = np.log1p(tokens_NT, dtype=np.float64).mean(1)
    return np.column_stack([varied_N, repetitive_N, 0.1 * rarity_N, 0.1 * np.log1p(documents_N)])


def _distinct(values_NT: np.ndarray) -> np.ndarray:
    """(N,) how many different values each line has."""
    sorted_NT = np.sort(values_NT, 1)
    return 1 + np.count_nonzero(sorted_NT[:, 1:] != sorted_NT[:, :-1], axis=1)


class CostPredictor:
    """A decayed mean of cost for each domain, times a ridge regression of the rest on the window's features."""

    def __init__(self, domains: int) -> None:
        self.weight_K = np.zeros(domains)
        self.sums_KC = np.zeros((domains, 1 + FEATURES))
        """Cost and features of each domain, weighted."""
        self.gram_FF = np.zeros((FEATURES, FEATURES))
        self.moment_F = np.zeros(FEATURES)
        self.squares = np.zeros(2)
        """Of what the regression left, and of what it was given: decayed sums, measured before each update."""

    @property
    def r2(self) -> float:
        """Share of the spread inside domains that the regression foretold."""
        left, given = self.squares
        return 1 - left / given if given > 0 else 0.0

    def predict(self, domains_N: np.ndarray, features_NF: np.ndarray) -> np.ndarray:
        """(N,) costs. Before anything was learned all windows cost 1."""
        means_NC = self._means()[domains_N]
        if self.r2 < MIN_R2:
            return means_NC[:, 0]
        return means_NC[:, 0] * (1 + self._regression(features_NF - means_NC[:, 1:]))

    def update(self, domains_N: np.ndarray, features_NF: np.ndarray, costs_N: np.ndarray) -> None:
        """Learn from windows that were computed, in order of their number."""
        means_NC = self._means()[domains_N]
        known_N = self.weight_K[domains_N] > 0
        x_NF = (features_NF - means_NC[:, 1:])[known_N]
        y_N = (costs_N / means_NC[:, 0] - 1)[known_N]
        fade = DECAY ** len(y_N)
        self.squares = fade * self.squares + [((y_N - self._regression(x_NF)) ** 2).sum(), (y_N**2).sum()]
        self.gram_FF = fade * self.gram_FF + x_NF.T @ x_NF
        self.moment_F = fade * self.moment_F + x_NF.T @ y_N
        count_K = np.bincount(domains_N, minlength=len(self.weight_K))
        fade_K = DECAY**count_K
        self.weight_K = fade_K * self.weight_K + count_K
        self.sums_KC *= fade_K[:, None]
        np.add.at(self.sums_KC, domains_N, np.column_stack([costs_N, features_NF]))

    def state(self) -> dict[str, Any]:
        """Numbers for a checkpoint's JSON, which keeps them exactly."""
        return {name: value.tolist() for name, value in vars(self).items()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`; of another number of domains: start again."""
        if len(state["weight_K"]) == len(self.weight_K):
            vars(self).update({name: np.array(value, float) for name, value in state.items()})

    def _means(self) -> np.ndarray:
        """(K, 1 + F); a domain that was not seen yet has the mean of all."""
        total = self.weight_K.sum()
        if total == 0:
            return np.ones_like(self.sums_KC)
        overall_C = self.sums_KC.sum(0) / total
        return np.where(self.weight_K[:, None] > 0, self.sums_KC / np.maximum(self.weight_K, 1e-9)[:, None], overall_C)

    def _regression(self, x_NF: np.ndarray) -> np.ndarray:
        trace = np.trace(self.gram_FF)
        if trace <= 0:
            return np.zeros(len(x_NF))
        ridge_FF = RIDGE * trace / FEATURES * np.eye(FEATURES)
        return x_NF @ np.linalg.solve(self.gram_FF + ridge_FF, self.moment_F)
