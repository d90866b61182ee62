"""The simulator against the design's tables, against ranks that really wait for each other, and as a command."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from megaboat.cli import main
from megaboat.engine.ranks import Ranks
from megaboat.errors import BadInput, DamagedData
from megaboat.parallel.balance.cost import TimeFit
from megaboat.parallel.balance.simulate import Case, Sync, check, fit_trace, simulate, step_time
from megaboat.parallel.balance.trace import Trace, read_trace
from tests.distributed import run_on_ranks

LAYERS, SEQ_LEN = 12, 1024
FIT = TimeFit(0.0, 1e-6, 0.0, 1.0)


def trace_of(cv: float, domains: float, correlated: bool = True, count: int = 40_000) -> Trace:
    """Windows of mean cost whose deviation is `cv`, of which a share `domains` lies between six domains; layers vary
    together or each by itself."""
    generator = np.random.default_rng(0)
    domain_N = generator.integers(0, 6, count)
    between_K = np.array([-1.46, -0.88, -0.29, 0.29, 0.88, 1.46])  # of deviation 1
    between_N = np.sqrt(domains) * between_K[domain_N]
    inside = generator.standard_normal((count, 1 if correlated else LAYERS)) * (1 if correlated else np.sqrt(LAYERS))
    rows_NL = 400 * (1 + cv * (between_N[:, None] + np.sqrt(1 - domains) * inside)) * np.ones((1, LAYERS))
    rows_NL = rows_NL.clip(1)
    samples = np.array([[1, 4, 10, 10, 1.0]])
    return Trace(rows_NL, np.zeros_like(rows_NL), domain_N, samples, 64, SEQ_LEN, 0.5)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(8), 1.134),
        (Case(512), 1.285),
        (Case(4096), 1.332),
        (Case(512, accumulate=8), 1.107),
        (Case(512, "2", accumulate=8), 1.284),
        (Case(512, accumulate=8, assignment="domain"), 1.057),
        (Case(512, accumulate=8, assignment="predicted"), 1.040),
        (Case(512, accumulate=8, assignment="perfect"), 1.003),
    ],
    ids=str,
)
def test_agrees_with_the_tables(case: Case, expected: float) -> None:
    """T1 and T3, typical spread: one window's cost deviates by 9.1 %, two thirds of it (squared) between domains; dealt
    at random it is as good as normal."""
    found = simulate(trace_of(0.091, 0.0 if case.assignment == "random" else 0.66), FIT, case, trials=12)
    assert found.slow_down == pytest.approx(expected, abs=0.02)
    assert found.low <= found.slow_down <= found.high
    if case.assignment == "random":
        assert found.rule > found.slow_down, "the rule of thumb is on the safe side"


def test_the_more_often_ranks_meet_the_slower() -> None:
    """ZeRO-3 lies between a meeting a step and one a micro-step where windows differ as wholes, and looking further
    ahead helps; a meeting a layer is the worst where layers differ by themselves."""
    whole, single = trace_of(0.09, 0.5), trace_of(0.09, 0.5, correlated=False)
    step, micro = (simulate(whole, FIT, Case(64, sync, 4), trials=5).slow_down for sync in ("1", "2"))
    near, far = (simulate(whole, FIT, Case(64, "3", 4, prefetch=p), trials=5).slow_down for p in (1, 3))
    assert step < far < near < micro
    micro, layer = (simulate(single, FIT, Case(64, sync, 4), trials=5).slow_down for sync in ("2", "layer"))
    assert layer > 1.2 * micro


def test_nodes_that_even_out() -> None:
    """A node of 8 is an average over 8, and the slowest of 64 is 2.4 deviations out; a slow link takes it all back."""
    trace = trace_of(0.091, 0.0)
    alone, fast, slow = (
        simulate(trace, FIT, Case(512, node=node, link=link), trials=5).slow_down
        for node, link in ((0, 1e9), (8, 1e15), (8, 1e8))
    )
    assert fast == pytest.approx(1 + 0.091 / np.sqrt(8) * 2.4, abs=0.02)
    assert slow > alone


def test_speeds_that_differ_add_up() -> None:
    even = trace_of(0.0001, 0.5)
    assert simulate(even, FIT, Case(512, jitter=0.02), trials=10).slow_down == pytest.approx(1.061, abs=0.01)


def sleep_through(ranks: Ranks, seconds_RML: np.ndarray, sync: Sync) -> float:
    """The shortest of three steps of ranks that sleep instead of computing, and wait for each other for real."""
    found = []
    for _ in range(3):
        ranks.barrier()
        started = time.perf_counter()
        for seconds_L in seconds_RML[ranks.rank]:
            for seconds in seconds_L if sync == "layer" else [seconds_L.sum()]:
                time.sleep(seconds)
                if sync == "layer":
                    ranks.barrier()
        ranks.barrier()
        found.append(time.perf_counter() - started)
    return min(found)


@pytest.mark.parametrize("sync", ["1", "layer"])
def test_agrees_with_ranks_that_wait(sync: Sync) -> None:
    """4 processes sleep in proportion to rows. A busy machine only ever makes a step longer: hence the shortest."""
    generator = np.random.default_rng(1)
    rows_RML = generator.uniform(50, 350, (4, 2, 2))
    seconds_RML = rows_RML / rows_RML.sum((1, 2)).mean()
    measured = max(run_on_ranks(sleep_through, 4, seconds_RML, sync))
    waits = {"1": seconds_RML.sum((1, 2)).max(), "layer": seconds_RML.max(0).sum()}
    foretold = step_time(seconds_RML, Case(4, sync, 2))
    assert foretold == pytest.approx(waits[sync])
    assert foretold == pytest.approx(measured, rel=0.1)


def lines_of(steps: int, noise: float = 0.0) -> list[dict]:
    generator = np.random.default_rng(2)
    lines = []
    for step in range(1, steps + 1):
        rows = generator.integers(100, 900, (8, 3))
        seconds = 0.01 + 1e-5 * rows.sum(1).reshape(4, 2).sum(1)
        seconds *= 1 + noise * generator.standard_normal(4)
        lines.append(
            {
                "step": step,
                "ranks": 4,
                "micro_batch": 1,
                "zero": 1,
                "seq_len": 1024,
                "width": 32,
                "sources": ["a", "b"],
                "domain": [0, 1] * 4,
                "window": list(range(8)),
                "rows": rows.tolist(),
                "pairs": (10 * rows).tolist(),
                "seconds": seconds.tolist(),
                "step_time": 0.2,
                "predictor_r2": 0.4,
            }  # fmt: skip
        )
    return lines


def write(path: Path, lines: list[dict], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def test_steps_that_the_fit_did_not_see(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "trace.jsonl", lines_of(20, 0.03)))
    assert fit_trace(trace).r2 > 0.9
    found = check(trace)
    assert found.foretold == pytest.approx(found.measured, rel=0.03)
    assert found.jitter == pytest.approx(0.03, abs=0.01)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "trace.jsonl", lines_of(10), tail='{"step": 11, "ra')
    options = ["--ranks", "4,64", "--zero", "1,3", "--accumulate", "2", "--node", "4", "--trials", "3"]
    files = ["--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.png")]
    assert main(["balance", "simulate", str(tmp_path), *options, *files]) == 0
    said = capsys.readouterr().out
    assert "80 windows of 10 steps" in said
    assert "Limits: " in said
    cases = json.loads((tmp_path / "a.json").read_text())["cases"]
    assert len(cases) == 2 * 2 * 4 * 2
    assert all(case["slow_down"] >= 0.999 for case in cases)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_bad_traces_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such trace; train with balance.trace_every"):
        read_trace(tmp_path)
    with pytest.raises(BadInput, match="no step was traced yet"):
        read_trace(write(tmp_path / "trace.jsonl", []))
    with pytest.raises(DamagedData, match=r"trace\.jsonl:2: not a line of a trace"):
        read_trace(write(tmp_path / "trace.jsonl", [*lines_of(1), {"step": 2}]))
