"""How much slower than in perfect balance a step of many ranks is, from the windows of a trace.

Windows are drawn at random from the trace, dealt to ranks, and timed by a fit of the trace's own seconds; what remains
is when ranks wait for each other. What it leaves out: windows are independent given their domain's share, networks are
never busy, hardware is even unless `jitter` says otherwise.

Letters: R ranks, M micro-steps, L layers, N windows.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from megaboat.parallel.balance.cost import TimeFit, fit_time
from megaboat.parallel.balance.figures import rule_of_thumb
from megaboat.parallel.balance.partition import chunk_lpt, karmarkar_karp
from megaboat.parallel.balance.trace import Trace

Sync = Literal["1", "2", "3", "layer"]
Assignment = Literal["random", "domain", "predicted", "perfect"]
MANY_WINDOWS = 8192  # the closer partition is for less


@dataclass(frozen=True)
class Case:
    """One way to train. `layer`: all ranks meet in every layer, as in sequence parallelism."""

    ranks: int
    sync: Sync = "1"
    accumulate: int = 1
    micro_batch: int = 1
    assignment: Assignment = "random"
    node: int = 0
    """Ranks that even out their active rows layer by layer; 0: none do."""
    prefetch: int = 2
    """ZeRO-3: layers whose parameters may be gathered ahead of the slowest rank."""
    link: float = 350e9
    """Bytes a second inside a node."""
    jitter: float = 0.0
    """Deviation of the ranks' speeds."""


class Result(NamedTuple):
    """Of one case; slow-downs are over perfect balance, from the 5th to the 95th of a hundred draws."""

    slow_down: float
    low: float
    high: float
    rule: float
    of_dense: float
    """Time over that of a model that activates every token, in perfect balance."""
    memory: float
    """Most active rows of a rank in a micro-step over their mean."""


def fit_trace(trace: Trace) -> TimeFit:
    """Seconds of a rank as a function of its work."""
    return fit_time(*trace.samples_SC[:, 1:].T)


class Check(NamedTuple):
    """The step time that ranks' own times make, and the one foretold from their work; the fit saw other steps."""

    measured: float
    foretold: float
    jitter: float
    """What the fit leaves of a rank's time, as a share."""


def check(trace: Trace, draws: int = 200) -> Check:
    """Fit on every other step of the trace, foretell the others: a step takes as long as its slowest rank."""
    steps = np.unique(trace.samples_SC[:, 0])
    learned = np.isin(trace.samples_SC[:, 0], steps[::2])
    if len(steps) < 2:
        learned = np.ones_like(learned)
    fit = fit_time(*trace.samples_SC[learned, 1:].T)
    expected_S = trace.samples_SC[:, 1:4] @ fit[:3]
    jitter = float((trace.samples_SC[learned, 4] / expected_S[learned] - 1).std())
    generator, measured, foretold = np.random.default_rng(0), [], []
    for step in steps[1::2] if len(steps) > 1 else steps:
        mine = trace.samples_SC[:, 0] == step
        noise = 1 + jitter * generator.standard_normal((draws, mine.sum()))
        measured.append(trace.samples_SC[mine, 4].max())
        foretold.append((expected_S[mine] * noise).max(1).mean())
    return Check(float(np.mean(measured)), float(np.mean(foretold)), jitter)


def simulate(trace: Trace, fit: TimeFit, case: Case, trials: int = 5, seed: int = 0) -> Result:
    """Draw `trials` steps of the case."""
    layers = trace.rows_NL.shape[1]
    cost_NL = fit.base / layers + fit.row * trace.rows_NL + fit.pair * trace.pairs_NL
    generator = np.random.default_rng(seed)
    found = np.array([_trial(trace, cost_NL, fit, case, generator) for _ in range(trials)])
    slow_T, memory_T = found.T
    whole_N = cost_NL.sum(1)
    per_sync = case.micro_batch * (case.accumulate if case.sync == "1" else 1)
    pairs = trace.pairs_NL.sum() / max(1.0, trace.rows_NL.sum())
    dense = fit.base + layers * trace.seq_len * (fit.row + fit.pair * pairs)
    low, high = np.percentile(slow_T, [5, 95])
    slow_down = float(slow_T.mean())
    rule = rule_of_thumb(float(whole_N.std() / whole_N.mean()), case.ranks, per_sync)
    return Result(slow_down, float(low), float(high), rule, slow_down * whole_N.mean() / dense, float(memory_T.mean()))


def _trial(
    trace: Trace, cost_NL: np.ndarray, fit: TimeFit, case: Case, generator: np.random.Generator
) -> tuple[float, float]:
    count = case.ranks * case.accumulate * case.micro_batch
    drawn = generator.integers(0, len(cost_NL), count)
    dealt = drawn[_deal(trace, cost_NL.sum(1), drawn, case, generator)]
    shape = (case.ranks, case.accumulate, case.micro_batch, -1)
    cost_RML = cost_NL[dealt].reshape(shape).sum(2)
    rows_RML = trace.rows_NL[dealt].reshape(shape).sum(2)
    ideal = cost_RML.sum((1, 2)).mean()
    if case.jitter:
        cost_RML = cost_RML * (1 + case.jitter * generator.standard_normal((case.ranks, 1, 1)))
    if case.node > 1:
        cost_RML, rows_RML = _even_out(cost_RML, rows_RML, trace.width, fit, case)
    held_RM = rows_RML.sum(2)
    return step_time(cost_RML, case) / ideal, held_RM.max() / max(held_RM.mean(), 1e-9)


def _deal(
    trace: Trace, cost_N: np.ndarray, drawn: np.ndarray, case: Case, generator: np.random.Generator
) -> np.ndarray:
    """(R, windows of a rank) places in `drawn`."""
    if case.assignment == "random":
        return np.arange(len(drawn)).reshape(case.ranks, -1)
    mean_N = np.empty_like(cost_N)
    for k in np.unique(trace.domain_N):
        mean_N[trace.domain_N == k] = cost_N[trace.domain_N == k].mean()
    r2 = {"domain": 0.0, "predicted": trace.predictor_r2, "perfect": 1.0}[case.assignment]
    rest_N = cost_N - mean_N
    noise = np.sqrt(r2 * (1 - r2)) * rest_N.std() * generator.standard_normal(len(drawn))
    expected = (mean_N + r2 * rest_N)[drawn] + noise
    once_a_step = case.sync == "1" and len(drawn) <= MANY_WINDOWS
    return (karmarkar_karp if once_a_step else chunk_lpt)(expected, case.ranks)


def _even_out(
    cost_RML: np.ndarray, rows_RML: np.ndarray, width: int, fit: TimeFit, case: Case
) -> tuple[np.ndarray, np.ndarray]:
    """Each node's ranks share their active rows layer by layer, and wait for each other there. A row of bf16 moves
    there and back, forward and backward."""
    groups = (-1, case.node, *cost_RML.shape[1:])
    cost_GKML, rows_GKML = cost_RML.reshape(groups), rows_RML.reshape(groups)
    mean_G1ML = rows_GKML.mean(1, keepdims=True)
    moved_G1ML = (rows_GKML - mean_G1ML).max(1, keepdims=True)
    seconds = moved_G1ML * 4 * 2 * width / case.link
    even = np.broadcast_to(cost_GKML.mean(1, keepdims=True) + seconds, cost_GKML.shape)
    return even.reshape(cost_RML.shape), np.broadcast_to(mean_G1ML, rows_GKML.shape).reshape(rows_RML.shape)


def step_time(cost_RML: np.ndarray, case: Case) -> float:
    """Seconds until the last rank is through; cost_RML: of each rank, micro-step and layer."""
    if case.sync == "1":
        return float(cost_RML.sum((1, 2)).max())
    if case.sync == "2":
        return float(cost_RML.sum(2).max(0).sum())
    if case.sync == "layer":
        return float(cost_RML.max(0).sum())
    done_R = np.zeros(len(cost_RML))
    gathered = [0.0] * case.prefetch  # when all ranks had begun each of the last layers
    for cost_R in cost_RML.reshape(len(cost_RML), -1).T:
        begun_R = np.maximum(done_R, gathered[-case.prefetch])
        gathered.append(float(begun_R.max()))
        done_R = begun_R + cost_R
    return float(done_R.max())
