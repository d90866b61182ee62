"""Figures of the balance between ranks and of activation by domain. N windows, rank after rank; R ranks; L layers."""

import math
from typing import Any

import numpy as np


def step_figures(
    rows_NLM: np.ndarray, costs_N: np.ndarray, expected_N: np.ndarray, seconds_R: np.ndarray, per_sync: int
) -> dict[str, Any]:
    """By name, for the object `balance` of metrics.jsonl. 1 is perfect balance in all that is called imbalance.

    costs_N, expected_N: shares of the dense cost, as measured and as they were foreseen; per_sync: windows of a rank
    between two moments at which ranks wait for each other.
    """
    ranks = len(seconds_R)
    costs_R, expected_R = (values.reshape(ranks, -1).sum(1) for values in (costs_N, expected_N))
    rows_RL = rows_NLM.sum(2).reshape(ranks, -1, rows_NLM.shape[1]).sum(1)
    cv1 = float(costs_N.std() / costs_N.mean())
    dense, spread = len(costs_N) / ranks, ((costs_N - costs_N.mean()) ** 2).sum()
    layer_mean = rows_RL.mean(0).sum()
    return {
        "imbalance_rows": _imbalance(rows_RL.sum(1)),
        "imbalance_cost": _imbalance(costs_R),
        "imbalance_time": _imbalance(seconds_R),
        "imbalance_layer": float(rows_RL.max(0).sum() / layer_mean) if layer_mean > 0 else 1.0,
        "cv1": cv1,
        "rule_of_thumb": rule_of_thumb(cv1, ranks, per_sync),
        "plan_residual": _imbalance(expected_R) - 1,
        "pred_r2": float(1 - ((costs_N - expected_N) ** 2).sum() / spread) if spread > 0 else 1.0,
        "saving_realised": float((dense - costs_R.max()) / max(dense - costs_R.mean(), 1e-12)),
    }


def domain_figures(rows_NLM: np.ndarray, domains_N: np.ndarray, names: list[str], tokens: int) -> dict[str, Any]:
    """`ratio_domain`: activation by name of domain and layer; `ratio_p10`, ...: of single windows, by layer."""
    ratio_NL = rows_NLM.mean(2) / tokens
    quantiles = {f"ratio_p{q}": _rounded(np.percentile(ratio_NL, q, axis=0)) for q in (10, 50, 90)}
    found = {names[k]: _rounded(ratio_NL[domains_N == k].mean(0)) for k in np.unique(domains_N)}
    return quantiles | {"ratio_domain": found}


def rule_of_thumb(cv1: float, ranks: int, per_sync: int) -> float:
    """Expected slow-down of shuffled windows dealt at random: 5 to 30 % more excess than there will be.

    cv1: deviation over mean of one window's cost; per_sync: windows of a rank between two meetings of all ranks.
    """
    return 1 + cv1 * math.sqrt(2 * math.log(ranks) / per_sync)


def _imbalance(values_R: np.ndarray) -> float:
    """Largest over mean; 1 where there is nothing."""
    return float(values_R.max() / values_R.mean()) if values_R.sum() > 0 else 1.0


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 5) for value in values]
