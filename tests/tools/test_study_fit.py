"""The laws of a study against known answers: exact data, coverage of intervals, and which law wins when it should."""

import math

import numpy as np
import pytest

from megaboat.tools.study_fit import (
    CONSTANT,
    LOG_LINE,
    LOGIT_LINE,
    POWER,
    PURE_POWER,
    Law,
    fit_laws,
    fit_layers,
    fit_power,
    leave_largest_out,
    logit,
    mean_interval,
    relative_depth,
    settled_step,
)

SIZES = np.array([1e6, 3e6, 1e7, 3e7, 1e8])


@pytest.mark.parametrize("truth", [(1.7, 400.0, 0.34), (0.0, 30.0, 0.1), (2.5, -3.0, 0.5)])
def test_a_power_law_is_found_exactly(truth: tuple[float, float, float]) -> None:
    floor, scale, exponent = truth
    found = fit_power(SIZES, floor + scale * SIZES**-exponent)
    np.testing.assert_allclose(found, truth, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("law", "coefficients"),
    [
        (CONSTANT, [0.4]),
        (LOG_LINE, [3.0, -0.1]),
        (LOGIT_LINE, [1.0, -0.08]),
        (PURE_POWER, [2.0, 0.07]),
        (POWER, [1.2, 300.0, 0.4]),
    ],
    ids=lambda value: value.name if isinstance(value, Law) else "",
)
def test_a_law_fits_what_it_predicts(law: Law, coefficients: list[float]) -> None:
    curve = law.predict(np.array(coefficients), SIZES)
    assert leave_largest_out(law, SIZES, curve) < 1e-4
    np.testing.assert_allclose(law.predict(law.fit(SIZES, curve), SIZES), curve, rtol=1e-5)


def test_the_law_that_the_data_follow_is_best_at_the_size_left_out() -> None:
    generator = np.random.default_rng(0)
    for laws, curve in (
        ((CONSTANT, LOG_LINE, POWER), 1.2 + 3000 * SIZES**-0.6),
        ((CONSTANT, LOGIT_LINE, POWER), 1 / (1 + np.exp(-(3.0 - 0.25 * np.log(SIZES))))),
    ):
        truth = POWER if curve is not None and curve[0] > 1 else LOGIT_LINE
        runs = [value + 1e-4 * generator.standard_normal(3) for value in curve]
        assert fit_laws(laws, SIZES, runs, draws=20)[0].law is truth


def test_too_few_sizes_leave_a_law_out_or_unjudged() -> None:
    runs = [np.array([1.0, 1.1]), np.array([0.8, 0.9])]
    found = {
        fitted.law.name: fitted.held_out_error for fitted in fit_laws((CONSTANT, LOG_LINE, POWER), SIZES[:2], runs)
    }
    assert set(found) == {"constant", "log-linear"}
    assert found["constant"] == pytest.approx(0.2)
    assert math.isnan(found["log-linear"])


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    hits = [0, 0]
    for _ in range(100):
        runs = [3.0 - 0.1 * math.log(size) + 0.02 * generator.standard_normal(3) for size in SIZES]
        slope = fit_laws((LOG_LINE,), SIZES, runs, draws=60)[0].intervals[1]
        hits[0] += slope.low <= -0.1 <= slope.high
        mean = mean_interval(list(runs[0]))
        hits[1] += mean.low <= 3.0 - 0.1 * math.log(SIZES[0]) <= mean.high
    assert 80 <= hits[0] <= 100, "a bootstrap of three runs a size is a little narrow"
    assert 88 <= hits[1] <= 100


def test_one_run_has_no_interval() -> None:
    alone = mean_interval([2.0])
    assert alone.mean == 2.0
    assert math.isnan(alone.low)
    assert math.isnan(mean_interval([math.nan]).mean)


def test_effects_of_depth_and_size_on_layers_are_told_apart() -> None:
    truth = {"level": -0.3, "depth": 1.2, "size": 0.4, "size x depth": -0.25}
    unit = float(np.exp(np.log(SIZES).mean()))
    layers = []
    for size, count in zip(SIZES, (4, 6, 8, 10, 12), strict=True):
        x, n = relative_depth(count) - 0.5, math.log(size / unit)
        score = truth["level"] + truth["depth"] * x + truth["size"] * n + truth["size x depth"] * n * x
        layers.append([1 / (1 + np.exp(-score))] * 2)
    best = fit_layers(SIZES.tolist(), layers, draws=10)[0]
    assert dict(zip(best.terms, best.coefficients_K, strict=True)) == pytest.approx(truth, abs=1e-6)
    assert best.held_out_error < 1e-6
    assert fit_layers([1.0, 2.0], layers[:2]) == []


def test_dead_layers_have_a_finite_logit() -> None:
    assert np.isfinite(logit(np.array([0.0, 1.0, 0.5]))).all()
    assert logit(np.array([0.5]))[0] == 0


def test_the_step_at_which_a_curve_settles() -> None:
    step = np.arange(1, 101)
    assert settled_step(step, np.where(step < 41, 0.9, 0.5)) == 41
    assert settled_step(step, np.full(100, 0.3)) == 1
