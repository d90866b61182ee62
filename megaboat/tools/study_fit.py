"""Small laws fitted to few points, with their uncertainty: pure functions on numpy arrays.

Letters: P points, S sizes, K coefficients, W draws.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Student's t, two-sided 95 %, by degrees of freedom from 1; beyond 30 the last is off by less than 0.5 %.
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
EXPONENTS = np.geomspace(0.01, 3.0, 120)
SMALLEST_SHARE = 1e-3  # a layer at 0 or 1 has no logit


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; NaN borders where one value says nothing about the spread."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Law:
    """A family of curves y(x) with K named coefficients, and how to fit one."""

    name: str
    formula: str
    coefficients: tuple[str, ...]
    fit: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """x_P, y_P -> the K coefficients of least squares."""
    predict: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """coefficients_K, x_P -> y_P."""


@dataclass(frozen=True)
class Fitted:
    """A law on the data of a study."""

    law: Law
    coefficients_K: np.ndarray
    intervals: list[Interval]
    """Of the coefficients, from the bootstrap."""
    draws_WK: np.ndarray
    held_out_error: float
    """|predicted - measured| at the largest size, by the law fitted to the others; NaN where they are too few."""

    def band(self, x_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The 95 % band of the curve."""
        curves_WP = np.array([self.law.predict(draw_K, x_P) for draw_K in self.draws_WK])
        low, high = np.percentile(curves_WP, [2.5, 97.5], axis=0)
        return low, high


def mean_interval(values: Sequence[float]) -> Interval:
    """Of independent runs, by Student's t."""
    found = np.array([value for value in values if math.isfinite(value)])
    if not len(found):
        return Interval(math.nan, math.nan, math.nan)
    mean = float(found.mean())
    if len(found) < 2:
        return Interval(mean, math.nan, math.nan)
    half = T95[min(len(found) - 1, len(T95)) - 1] * float(found.std(ddof=1)) / math.sqrt(len(found))
    return Interval(mean, mean - half, mean + half)


def logit(share: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)), of shares kept away from 0 and 1."""
    kept = np.clip(share, SMALLEST_SHARE, 1 - SMALLEST_SHARE)
    return np.log(kept / (1 - kept))


def fit_power(x_P: np.ndarray, y_P: np.ndarray) -> np.ndarray:
    """floor, scale, exponent of y = floor + scale x^-exponent, 0 <= floor, by least squares.

    For a fixed exponent the others are linear: those of a grid of exponents are solved, then the best is refined.
    """
    unit = float(np.exp(np.log(x_P).mean()))  # x^-3 of a billion is no number to solve with

    def solve(exponent: float) -> tuple[float, np.ndarray]:
        basis_P = (x_P / unit) ** -exponent
        matrix_P2 = np.stack([np.ones_like(basis_P), basis_P], 1)
        solution, *_ = np.linalg.lstsq(matrix_P2, y_P, rcond=None)
        if solution[0] < 0:
            solution = np.array([0.0, float(basis_P @ y_P / (basis_P @ basis_P))])
        return float(((matrix_P2 @ solution - y_P) ** 2).sum()), solution

    errors = [solve(exponent)[0] for exponent in EXPONENTS]
    best = int(np.argmin(errors))
    low, high = EXPONENTS[max(0, best - 1)], EXPONENTS[min(len(EXPONENTS) - 1, best + 1)]
    exponent = _golden(lambda value: solve(value)[0], low, high)
    floor, scale = solve(exponent)[1]
    return np.array([floor, scale * unit**exponent, exponent])


def fit_lines(columns: np.ndarray, y_P: np.ndarray) -> np.ndarray:
    """Coefficients of least squares for (P, K) columns."""
    solution, *_ = np.linalg.lstsq(columns, y_P, rcond=None)
    return solution


CONSTANT = Law(
    "constant", "y = c", ("c",), lambda x, y: np.array([y.mean()]), lambda c, x: np.full_like(x, c[0], dtype=float)
)
LOG_LINE = Law(
    "log-linear",
    "y = a + b ln x",
    ("a", "b"),
    lambda x, y: fit_lines(np.stack([np.ones_like(x), np.log(x)], 1), y),
    lambda c, x: c[0] + c[1] * np.log(x),
)
LOGIT_LINE = Law(
    "logit-linear",
    "logit y = a + b ln x",
    ("a", "b"),
    lambda x, y: fit_lines(np.stack([np.ones_like(x), np.log(x)], 1), logit(y)),
    lambda c, x: 1 / (1 + np.exp(-(c[0] + c[1] * np.log(x)))),
)
POWER = Law(
    "power with a floor",
    "y = e + a x^-k",
    ("e", "a", "k"),
    fit_power,
    lambda c, x: c[0] + c[1] * x ** -c[2],
)
PURE_POWER = Law(
    "power",
    "y = a x^-k",
    ("ln a", "k"),
    lambda x, y: fit_lines(np.stack([np.ones_like(x), -np.log(x)], 1), np.log(y)),
    lambda c, x: np.exp(c[0] - c[1] * np.log(x)),
)


def fit_laws(
    laws: Sequence[Law], sizes_S: np.ndarray, runs: Sequence[np.ndarray], draws: int = 400, seed: int = 0
) -> list[Fitted]:
    """Each law that the sizes suffice for, best held-out error first. `runs`: for each size, one value a seed.

    The bootstrap draws the runs of each size anew. With n runs a size it says too little by sqrt((n - 1) / n), for
    which the draws' distance from their mean is made good.
    """
    means_S = np.array([values.mean() for values in runs])
    found = []
    for law in laws:
        if len(sizes_S) < len(law.coefficients):
            continue
        generator = np.random.default_rng(seed)
        samples_WS = np.array([[_redraw(values, generator) for values in runs] for _ in range(draws)])
        draws_WK = np.array([law.fit(sizes_S, sample_S) for sample_S in samples_WS])
        low_K, high_K = np.percentile(draws_WK, [2.5, 97.5], axis=0)
        fitted_K = law.fit(sizes_S, means_S)
        intervals = [Interval(*map(float, borders)) for borders in zip(fitted_K, low_K, high_K, strict=True)]
        found.append(Fitted(law, fitted_K, intervals, draws_WK, leave_largest_out(law, sizes_S, means_S)))
    return sorted(found, key=lambda fitted: (math.isnan(fitted.held_out_error), fitted.held_out_error))


def leave_largest_out(law: Law, sizes_S: np.ndarray, means_S: np.ndarray) -> float:
    """How far off the law is at the largest size when it was fitted to the others."""
    order = np.argsort(sizes_S)
    if len(order) <= len(law.coefficients):
        return math.nan
    known, held_out = order[:-1], order[-1:]
    coefficients_K = law.fit(sizes_S[known], means_S[known])
    return float(np.abs(law.predict(coefficients_K, sizes_S[held_out]) - means_S[held_out])[0])


@dataclass(frozen=True)
class LayerFit:
    """logit activation = level + size ln(N / N0) + depth (x - 1/2) + both ln(N / N0) (x - 1/2), x relative depth."""

    terms: tuple[str, ...]
    coefficients_K: np.ndarray
    intervals: list[Interval]
    held_out_error: float
    """Root mean square on the logit scale over the layers of the largest size."""


TERMS = ("level", "depth", "size", "size x depth")


def fit_layers(
    sizes: Sequence[float], layers: Sequence[Sequence[np.ndarray]], draws: int = 400, seed: int = 0
) -> list[LayerFit]:
    """`layers`: for each size, one array of the layers' activation a seed. Without and with each of size's terms."""
    if len(sizes) < 3:
        return []
    unit = float(np.exp(np.log(np.array(sizes)).mean()))
    found = []
    for terms in (TERMS[:2], TERMS[:3], TERMS):

        def fit(runs: Sequence[Sequence[np.ndarray]], kept: Sequence[int], count: int = len(terms)) -> np.ndarray:
            rows = [_rows(sizes[s] / unit, ratio_L) for s in kept for ratio_L in runs[s]]
            columns = np.concatenate([columns for columns, _ in rows])[:, :count]
            return fit_lines(columns, np.concatenate([y for _, y in rows]))

        everything = range(len(sizes))
        order = np.argsort(sizes)
        generator = np.random.default_rng(seed)
        drawn_WK = np.array(
            [
                fit([[runs[i] for i in generator.integers(len(runs), size=len(runs))] for runs in layers], everything)
                for _ in range(draws)
            ]
        )
        low_K, high_K = np.percentile(drawn_WK, [2.5, 97.5], axis=0)
        fitted_K = fit(layers, everything)
        known_K, largest = fit(layers, order[:-1].tolist()), int(order[-1])
        tested = [_rows(sizes[largest] / unit, ratio_L) for ratio_L in layers[largest]]
        errors = np.concatenate([columns[:, : len(terms)] @ known_K - y for columns, y in tested])
        intervals = [Interval(*map(float, borders)) for borders in zip(fitted_K, low_K, high_K, strict=True)]
        found.append(LayerFit(terms, fitted_K, intervals, float(np.sqrt((errors**2).mean()))))
    return sorted(found, key=lambda fit: fit.held_out_error)


def settled_step(step_S: np.ndarray, value_S: np.ndarray, within: float = 0.02) -> int | None:
    """The first step from which the value stays within `within` of its mean over the last tenth; None: never."""
    last = float(np.nanmean(value_S[-max(1, len(value_S) // 10) :]))
    outside = np.flatnonzero(~(np.abs(value_S - last) <= within))
    first = int(outside[-1]) + 1 if len(outside) else 0
    return int(step_S[first]) if first < len(step_S) else None


def relative_depth(layers: int) -> np.ndarray:
    """0 next to the input, 1 next to the output."""
    return np.arange(layers) / max(1, layers - 1)


def _rows(size: float, ratio_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    depth_L = relative_depth(len(ratio_L)) - 0.5
    ones_L, log_L = np.ones_like(depth_L), np.full_like(depth_L, math.log(size))
    return np.stack([ones_L, depth_L, log_L, log_L * depth_L], 1), logit(ratio_L)


def _redraw(values: np.ndarray, generator: np.random.Generator) -> float:
    n = len(values)
    drawn = float(values[generator.integers(n, size=n)].mean())
    widen = math.sqrt(n / (n - 1)) if n > 1 else 1.0
    return float(values.mean()) + widen * (drawn - float(values.mean()))


def _golden(error: Callable[[float], float], low: float, high: float, rounds: int = 40) -> float:
    """The least of a function with one valley, by golden section."""
    ratio = (math.sqrt(5) - 1) / 2
    for _ in itertools.repeat(None, rounds):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if error(left) < error(right) else (left, high)
    return (low + high) / 2
