"""Histograms, spans and figures against loops over single tokens."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megaboat.layers.configurator import Routing
from megaboat.parallel.balance.margins import BINS, EDGES, count_margins, quantile
from megaboat.parallel.balance.statistics import read_sums, spans, sum_layers

LAYERS, TOKENS, MODULES, WINDOW = 3, 60, 2, 4
CU_SEQLENS = torch.tensor([0, 7, 30, 30, 60], dtype=torch.int32)


def routings(seed: int) -> list[Routing]:
    generator = torch.Generator().manual_seed(seed)
    margin_LXM = torch.randn(LAYERS, TOKENS, MODULES, generator=generator) * 5
    temperature_M = torch.tensor([2.0, 7.0])
    active_LXM = margin_LXM > 0
    confidence_LXM = torch.sigmoid(margin_LXM / temperature_M) * active_LXM
    return [Routing(*parts, temperature_M.log()) for parts in zip(active_LXM, confidence_LXM, margin_LXM, strict=True)]


def sums_of(*seeds: int) -> np.ndarray:
    zero_LM = torch.zeros(LAYERS, MODULES)
    return sum(sum_layers(routings(seed), zero_LM, CU_SEQLENS, WINDOW) for seed in seeds).numpy()


def test_counts_are_those_of_numpy() -> None:
    margin_LXM = torch.randn(2, 500, 1) * torch.logspace(-3, 4, 500)[None, :, None]
    counts_LMK = count_margins(margin_LXM).numpy()
    assert counts_LMK.shape == (2, 1, BINS)
    inside = margin_LXM.double().numpy().clip(EDGES[0], np.nextafter(EDGES[-1], 0))
    for layer in range(2):
        expected, _ = np.histogram(inside[layer, :, 0], EDGES)
        # A margin within a rounding of a border may be counted on either side of it.
        assert np.abs(np.cumsum(counts_LMK[layer, 0] - expected)).max() <= 1
        assert counts_LMK[layer, 0].sum() == 500
        assert counts_LMK[layer, 0, BINS // 2 :].sum() == (margin_LXM[layer] >= 0).sum()


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_quantiles(share: float) -> None:
    margins = np.random.default_rng(0).normal(3, 20, 20_000).astype(np.float32)
    threshold = quantile(count_margins(torch.from_numpy(margins)[None, :, None])[0, 0].numpy(), share)
    assert (margins > threshold).mean() == pytest.approx(share, abs=0.002)


def test_quantile_of_nothing() -> None:
    assert quantile(np.zeros(BINS, np.int64), 0.3) == 0.0


def test_spans_by_loops() -> None:
    active_LXM = torch.rand(LAYERS, TOKENS, MODULES, generator=torch.Generator().manual_seed(3)) < 0.5
    active_LXM[1] = False
    found = spans(active_LXM, CU_SEQLENS, WINDOW)
    for layer, module in np.ndindex(LAYERS, MODULES):
        for start, end in zip(CU_SEQLENS[:-1].tolist(), CU_SEQLENS[1:].tolist(), strict=True):
            seen: list[int] = []
            for t in range(start, end):
                expected = 0
                if active_LXM[layer, t, module]:
                    seen.append(t)
                    expected = t - seen[-WINDOW - 1 :][0]
                assert found[layer, t, module] == expected


def test_figures_against_brute_force() -> None:
    sums = read_sums(sums_of(1, 2), np.zeros((LAYERS, MODULES)))
    assert sums.tokens == 2 * TOKENS
    figures = sums.figures()
    both = [[getattr(r, name) for r in (routings(1)[layer], routings(2)[layer])] for layer in range(LAYERS)
            for name in ("active_XM", "confidence_XM", "margin_XM")]  # fmt: skip
    for layer in range(LAYERS):
        active, confidence, margin = (torch.cat(parts).double() for parts in both[3 * layer : 3 * layer + 3])
        assert sums.active_LM[layer].tolist() == active.sum(0).tolist()
        assert figures["confidence"][layer] == pytest.approx(float(confidence.sum() / active.sum()), abs=1e-5)
        p = torch.sigmoid(margin / torch.tensor([2.0, 7.0]))
        entropy = -(p * p.log2() + (1 - p) * (1 - p).log2())
        assert figures["entropy"][layer] == pytest.approx(float(entropy.mean()), abs=1e-5)
        assert figures["near_threshold"][layer] == pytest.approx(float((margin.abs() < 1e-3).double().mean()), abs=1e-6)
        assert figures["margin_q50"][layer] == pytest.approx(float(margin.quantile(0.5)), abs=0.3)


def test_sums_are_the_same_in_any_order() -> None:
    """Whole numbers: thresholds that follow from them do not depend on the number of ranks."""
    counts = LAYERS * MODULES * (BINS + 4)
    ways = [sums_of(1, 2, 3, 4), sums_of(4, 2) + sums_of(3, 1), sums_of(3) + sums_of(1, 4, 2)]
    for way in ways[1:]:
        assert np.array_equal(way[:counts], ways[0][:counts])
        np.testing.assert_allclose(way, ways[0], rtol=1e-6)


def test_near_and_turned_away() -> None:
    margin_XM = torch.tensor([[0.0005], [-0.0005], [2.0], [3.0]])
    active_XM = torch.tensor([[True], [False], [True], [False]])  # the last one was over its threshold
    routing = Routing(active_XM, active_XM * 0.7, margin_XM, torch.ones(1))
    borders = torch.tensor([0, 4], dtype=torch.int32)
    vector: Tensor = sum_layers([routing], torch.zeros(1, 1), borders, WINDOW)
    sums = read_sums(vector.numpy(), np.zeros((1, 1)))
    assert (sums.near_LM.item(), sums.dropped_LM.item(), sums.active_LM.item()) == (2, 1, 2)
