import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaboat.data.order import CYCLE, ContiguousOrder, ShuffledOrder, Stretch, permute, slots_of
from megaboat.errors import BadInput

# Tokens per source, as uneven as the Pile's.
SOURCES = {"books": 40_000_000, "code": 9_000_017, "law": 2_500_000, "mail": 300_001}
LENGTH = 1024

PINNED_FULL = "28d8d32fa8f543f1441ed81787236b1b69bb9cd19a3a8ba3df5df0937ceb034a"
PINNED_GROUPED = "997df2ebbf76ef27c6ce6cefc9a47a184c0a0406fc85527080031af811c59fdb"
PINNED_PLAN = "ee3611f4a6718b57a1c39718854be8f6c74bf8a8a567b11ee5b51110ebcb70f3"


def make_order(weights: tuple[float, ...] = (5, 3, 1.5, 0.5), group_tokens: int = 0, seed: int = 0) -> ShuffledOrder:
    return ShuffledOrder(SOURCES, [Stretch(0, slots_of(list(weights)))], LENGTH, seed, group_tokens)


def fingerprint(order: ShuffledOrder | ContiguousOrder, windows: int = 10_000) -> str:
    source, start = order.locate(np.arange(windows))
    return hashlib.sha256(source.astype("<i8").tobytes() + start.astype("<i8").tobytes()).hexdigest()


def test_the_order_is_pinned() -> None:
    """A change here makes every checkpoint in the world unable to go on: it needs a new state format."""
    assert fingerprint(make_order()) == PINNED_FULL
    assert fingerprint(make_order(group_tokens=1 << 20)) == PINNED_GROUPED
    assert make_order().plan_id(10_000) == PINNED_PLAN


@settings(max_examples=100)
@given(count=st.integers(1, 3000), label=st.text(st.characters(codec="utf-8"), max_size=8))
def test_permute_is_a_permutation(count: int, label: str) -> None:
    assert np.array_equal(np.sort(permute(np.arange(count), count, label)), np.arange(count))


def test_permute_spreads_evenly_and_depends_on_the_label() -> None:
    count = 100_003
    a, b = (permute(np.arange(count), count, label) for label in ("0:a:0", "0:a:1"))
    assert abs(np.corrcoef(np.arange(count), a)[0, 1]) < 0.01
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.01
    assert np.mean(np.abs(np.diff(a)) == 1) < 1e-3
    # Of a random permutation about one point is fixed.
    assert np.sum(a == np.arange(count)) < 10


@pytest.mark.parametrize("group_tokens", [0, 1 << 18])
def test_every_window_comes_once_an_epoch(group_tokens: int) -> None:
    order = make_order(weights=(30, 0, 4, 0.3), group_tokens=group_tokens)
    source, start = order.locate(np.arange(2 * CYCLE))
    epoch_windows = order.windows_per_epoch()
    for k, name in ((2, "law"), (3, "mail")):
        mine, size = start[source == k], epoch_windows[k]
        epochs = [np.sort(mine[first : first + size]) for first in range(0, len(mine) - size + 1, size)]
        assert len(epochs) > 2
        for places in epochs:
            assert np.array_equal(np.diff(places), np.full(size - 1, LENGTH))
            assert places[-1] + LENGTH + 1 <= SOURCES[name]
        assert len({int(places[0]) for places in epochs}) > 1, "window borders move from epoch to epoch"


def test_the_mixture_is_exact_over_a_cycle_and_close_within() -> None:
    weights = np.array([5, 3, 1.5, 0.5])
    source, _ = make_order().locate(np.arange(3 * CYCLE))
    for cycle in np.split(source, 3):
        shares = np.bincount(cycle) / CYCLE
        assert np.abs(shares / (weights / 10) - 1).max() < 1e-3
    running = np.cumsum(source[:, None] == np.arange(4), axis=0) / np.arange(1, len(source) + 1)[:, None]
    assert np.abs(running[4096:] - weights / 10).max() < 0.02


def test_a_window_is_found_alone_as_among_others() -> None:
    order = make_order()
    windows = np.array([0, 1, CYCLE - 1, CYCLE, 5 * CYCLE + 17, 10**9, 10**12])
    source, start = order.locate(windows)
    for i, window in enumerate(windows):
        alone = order.locate(np.array([window]))
        assert (alone[0][0], alone[1][0]) == (source[i], start[i])


def test_drawn_counts_what_locate_gives() -> None:
    order = ShuffledOrder(
        SOURCES, [Stretch(0, slots_of([1, 1, 1, 1])), Stretch(2 * CYCLE, slots_of([0, 1, 2, 0]))], LENGTH, 3
    )
    source, _ = order.locate(np.arange(3 * CYCLE))
    for windows in (0, 1, 1000, CYCLE, 2 * CYCLE - 1, 2 * CYCLE, 2 * CYCLE + 777):
        assert order.drawn(windows) == np.bincount(source[:windows], minlength=4).tolist()


def test_a_phase_goes_on_where_the_sources_were() -> None:
    """Windows of an epoch stay unrepeated across a change of weights."""
    order = ShuffledOrder(
        SOURCES, [Stretch(0, slots_of([50, 49.5, 0.5, 0])), Stretch(CYCLE, slots_of([99, 0.5, 0.5, 0]))], LENGTH, 0
    )
    source, start = order.locate(np.arange(2 * CYCLE))
    mine = start[source == 2]
    assert CYCLE * 0.009 < len(mine) <= order.windows_per_epoch()[2]
    assert len(np.unique(mine)) == len(mine)


def test_plan_id_knows_the_past_only() -> None:
    first, later = Stretch(0, slots_of([1, 1, 1, 1])), Stretch(2 * CYCLE, slots_of([0, 1, 2, 0]))
    short = ShuffledOrder(SOURCES, [first], LENGTH, 0)
    long = ShuffledOrder(SOURCES, [first, later], LENGTH, 0)
    assert short.plan_id(2 * CYCLE) == long.plan_id(2 * CYCLE)
    assert short.plan_id(2 * CYCLE + 1) != long.plan_id(2 * CYCLE + 1)
    assert short.plan_id(5) != ShuffledOrder(SOURCES, [first], LENGTH, 1).plan_id(5)


def test_grouped_windows_are_neighbours() -> None:
    group = 1 << 18
    order = make_order(weights=(1, 0, 0, 0), group_tokens=group)
    _, start = order.locate(np.arange(2000))
    for first in range(0, 2000 - 256, 256):
        assert np.ptp(start[first : first + 256]) < group
    assert np.abs(np.diff(start[::256])).min() >= group // 2


def test_contiguous_lanes_read_on() -> None:
    order = ContiguousOrder("enwik8", 100_003, 64, rows=5)
    windows = np.arange(5 * order.steps)
    _, start = order.locate(windows)
    lanes = start.reshape(order.steps, 5)
    assert np.all(np.diff(lanes, axis=0) == 64)
    assert len(np.unique(start)) == len(start) == order.windows_per_epoch()[0]
    assert start.max() + 65 <= 100_003
    assert np.array_equal(order.locate(windows + len(windows))[1], start), "the second epoch is the first again"
    assert order.plan_id(10) != ContiguousOrder("enwik8", 100_003, 64, rows=6).plan_id(10)


def test_sources_shorter_than_two_windows_are_refused() -> None:
    with pytest.raises(BadInput, match="'tiny' has 2,047 tokens, fewer than two windows of 1,024"):
        ShuffledOrder({"tiny": 2047}, [Stretch(0, (CYCLE,))], 1024, 0)
    ShuffledOrder({"tiny": 2047, "big": 10**6}, [Stretch(0, (0, CYCLE))], 1024, 0)
    with pytest.raises(BadInput, match="too few for 4 contiguous rows"):
        ContiguousOrder("x", 4096, 1024, rows=4)


@settings(max_examples=200)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30).filter(lambda weights: sum(weights) > 0))
def test_slots_fill_the_cycle_and_follow_the_weights(weights: list[float]) -> None:
    slots = slots_of(weights)
    assert sum(slots) == CYCLE
    for slot, weight in zip(slots, weights, strict=True):
        assert abs(slot - weight / sum(weights) * CYCLE) <= 1
