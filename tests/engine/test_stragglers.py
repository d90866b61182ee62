"""Slow hardware and high activation are told apart."""

import logging
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megaboat.engine.ranks import Ranks
from megaboat.engine.roll_call import roll_call
from megaboat.engine.stopwatch import Stopwatch
from megaboat.engine.stragglers import Stragglers, slowness
from tests.distributed import run_on_ranks

STEPS, RANKS = 50, 8


def steps(slow: dict[int, float], busy: dict[int, float], noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and FLOPs of steps x ranks, where a step costs 10 ms and 1 ms for each unit of work, on most ranks."""
    draw = np.random.default_rng(0)
    flops_SR = draw.uniform(20, 40, (STEPS, RANKS)) * np.array([busy.get(rank, 1.0) for rank in range(RANKS)])
    speed_R = np.array([slow.get(rank, 1.0) for rank in range(RANKS)])
    seconds_SR = (0.010 + 0.001 * flops_SR) * speed_R * (1 + noise * draw.standard_normal((STEPS, RANKS)))
    return seconds_SR, flops_SR


def test_a_slow_rank_is_found_at_its_own_factor() -> None:
    ratio_R = slowness(*steps(slow={3: 1.5}, busy={}))
    assert ratio_R[3] == pytest.approx(1.5, abs=0.1)
    assert np.delete(ratio_R, 3) == pytest.approx(np.ones(RANKS - 1), abs=0.1)


def test_a_busy_rank_is_not_slow() -> None:
    seconds_SR, flops_SR = steps(slow={}, busy={2: 2.0, 5: 0.3})
    assert seconds_SR.mean(0)[2] > 1.5 * np.median(seconds_SR.mean(0))
    assert slowness(seconds_SR, flops_SR) == pytest.approx(np.ones(RANKS), abs=0.1)


def test_a_slow_rank_with_little_to_do_is_slow() -> None:
    seconds_SR, flops_SR = steps(slow={4: 1.6}, busy={4: 0.4})
    assert seconds_SR.mean(0)[4] < 1.2 * np.median(seconds_SR.mean(0)), "time alone does not show it"
    assert slowness(seconds_SR, flops_SR)[4] > 1.3


def test_of_two_ranks_the_slower_one_and_work_that_never_changes() -> None:
    assert slowness(np.array([[1.0, 1.5]] * 9), np.ones((9, 2))) == pytest.approx([1.0, 1.5])


def test_a_rank_that_stands_out_twice_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megaboat")
    logging.getLogger("megaboat").propagate = True
    stragglers = Stragglers([f"mb{rank // 4 + 1}" for rank in range(RANKS)], window=STEPS)
    for seconds_SR, flops_SR in (steps({6: 1.5}, {1: 1.8}), steps({6: 1.5}, {1: 1.8})):
        assert not caplog.messages
        for seconds_R, flops_R in zip(seconds_SR, flops_SR, strict=True):
            stragglers.add(seconds_R, flops_R)
    slow, busy = dict.fromkeys(caplog.messages)  # once or twice, as the logger was set up before
    assert slow.startswith("rank 6 (mb2) takes 1.")
    assert "times as long as the median rank for the same work, over the last 100 steps" in slow
    assert busy.startswith("rank 1 (mb1) has 1.")
    assert stragglers.slowness == pytest.approx(1.5, abs=0.15)


def test_waiting_is_no_work() -> None:
    watch = Stopwatch(torch.device("cpu"))
    with watch:
        time.sleep(0.2)
    slept = watch.read()
    assert slept < 0.1
    with watch.backward:
        sum(range(100_000))
    assert watch.read() > slept


def call_the_roll(ranks: Ranks, folder: Path, lonely: bool) -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megaboat")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    path = folder / (f"seen-{ranks.rank}" if lonely else "seen")
    if ranks.is_first:
        path.write_text("rank 0 was here")
    roll_call(ranks, path, patience=1)
    return said


def test_the_roll_call_measures_the_links(tmp_path: Path) -> None:
    (said,) = run_on_ranks(call_the_roll, 3, tmp_path, False)[0]
    assert said.startswith("3 ranks on 1 nodes (")
    assert float(said.split("all-reduce ")[1].split(" GB/s")[0]) > 0
    assert "clocks within 0." in said


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 1 .* does not see .*seen-0, which rank 0"):
        run_on_ranks(call_the_roll, 2, tmp_path, True)
