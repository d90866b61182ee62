"""The closed form of a window's cost, its fit to measured time, and the figures made of it."""

import numpy as np
import pytest
import torch

from megaboat.model.config import SeqBoatConfig
from megaboat.model.flops import count_work_by_part, forward_flops
from megaboat.parallel.balance.cost import WindowCost, fit_time
from megaboat.parallel.balance.figures import domain_figures, rule_of_thumb, step_figures

MODEL = SeqBoatConfig(layers=3, width=32, qk_dim=16, window=5, vocab_size=100, modules=2)


def test_is_the_share_of_the_dense_flops() -> None:
    cost = WindowCost.of(MODEL, 40)
    borders = torch.tensor([0, 40, 55, 80], dtype=torch.int32)
    for density in (0.0, 0.3, 1.1):
        active_LXM = torch.rand(3, 80, 2, generator=torch.Generator().manual_seed(1)) < density
        work = count_work_by_part(active_LXM, borders, MODEL.window, 2)
        dense = count_work_by_part(torch.ones(3, 40, 2, dtype=torch.bool), borders[:2], MODEL.window, 1)
        full = forward_flops(MODEL, 40, dense)
        found = cost(work.rows_LM.numpy(), work.pairs_LM.numpy())
        for window in range(2):
            mine = type(work)(work.rows_LM[window], work.pairs_LM[window])
            assert found[window] == pytest.approx(forward_flops(MODEL, 40, mine) / full, rel=1e-12)
    assert found[0] == pytest.approx(1.0)


def test_parts_add_up() -> None:
    active_LXM = torch.rand(3, 90, 2) < 0.4
    borders = torch.tensor([0, 10, 30, 45, 60, 90], dtype=torch.int32)
    whole = count_work_by_part(active_LXM, borders, 4, 1)
    parts = count_work_by_part(active_LXM, borders, 4, 3)
    assert torch.equal(parts.rows_LM.sum(0), whole.rows_LM[0])
    assert torch.equal(parts.pairs_LM.sum(0), whole.pairs_LM[0])
    assert torch.equal(parts.rows_LM[1], active_LXM[:, 30:60].sum(1))


def test_the_fit_finds_the_coefficients() -> None:
    generator = np.random.default_rng(0)
    windows, rows = np.full(60, 4.0), generator.uniform(500, 1500, 60)
    pairs = rows * generator.uniform(20, 60, 60)
    fit = fit_time(windows, rows, pairs, 0.1 * windows + 2e-4 * rows + 1e-6 * pairs)
    np.testing.assert_allclose(fit[:3], [0.1, 2e-4, 1e-6], rtol=1e-6)
    assert fit.r2 == pytest.approx(1.0)


def test_no_work_costs_less_than_nothing() -> None:
    windows, rows = np.full(20, 4.0), np.linspace(500, 1500, 20)
    fit = fit_time(windows, rows, rows * 30, 2.0 - 1e-4 * rows)
    assert min(fit[:3]) >= 0


def test_figures_of_a_step() -> None:
    """Two ranks of two windows, one layer."""
    rows_NLM = np.array([10, 20, 30, 40.0]).reshape(4, 1, 1)
    costs_N = np.array([0.2, 0.3, 0.4, 0.5])
    figures = step_figures(rows_NLM, costs_N, costs_N[::-1].copy(), np.array([1.0, 3.0]), 2)
    assert figures["imbalance_rows"] == figures["imbalance_layer"] == pytest.approx(70 / 50)
    assert figures["imbalance_cost"] == pytest.approx(0.9 / 0.7)
    assert figures["imbalance_time"] == pytest.approx(1.5)
    assert figures["plan_residual"] == pytest.approx(0.9 / 0.7 - 1)
    assert figures["cv1"] == pytest.approx(np.std(costs_N) / 0.35)
    assert figures["pred_r2"] == pytest.approx(1 - (0.3**2 + 0.1**2) * 2 / ((0.15**2 + 0.05**2) * 2))
    assert figures["saving_realised"] == pytest.approx((2 - 0.9) / (2 - 0.7))
    assert figures["rule_of_thumb"] == rule_of_thumb(figures["cv1"], 2, 2)


def test_the_rule_is_safe_by_the_tables() -> None:
    """Typical spread, R = 512: 1.285 and 1.107 were simulated for 1 and 8 windows; the rule may say more, not less."""
    assert 1.285 < rule_of_thumb(0.091, 512, 1) < 1.285 + 0.3 * 0.285
    assert 1.107 < rule_of_thumb(0.091, 512, 8) < 1.107 + 0.3 * 0.107


def test_figures_of_domains() -> None:
    rows_NLM = np.array([[2, 4], [4, 8], [6, 6]], float)[..., None]
    figures = domain_figures(rows_NLM, np.array([0, 0, 2]), ["a", "b", "c"], 10)
    assert figures["ratio_domain"] == {"a": [0.3, 0.6], "c": [0.6, 0.6]}
    assert figures["ratio_p50"] == [0.4, 0.6]
