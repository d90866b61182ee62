"""Even parts of the rows of all ranks: by hand, as a permutation whatever the counts, and when they are worth it."""

import random

import pytest

from megaboat.model.config import SeqBoatConfig
from megaboat.parallel.parts import ALWAYS, Holding, Move, Parts, Price


def spans(holding: Holding) -> list[tuple[int, int]]:
    return [run[:2] for runs in holding for run in runs]


def test_rows_that_are_each_ranks_own() -> None:
    parts = Parts.of([[10], [0], [2], [4]], window=3, continues=False)
    assert spans(parts.own) == [(0, 10), (10, 10), (10, 12), (12, 16)]
    assert spans(parts.even) == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert spans(parts.seen) == [(0, 4), (1, 8), (5, 12), (12, 16)]
    assert spans(parts.before) == [(0, 0), (1, 4), (5, 8), (12, 12)]
    assert parts.most() == (10, 4, 6)


def test_pieces_of_the_same_rows() -> None:
    """Two rows over two ranks: 6 and 0 active rows of the first, 1 and 5 of the second."""
    parts = Parts.of([[6, 1], [0, 5]], window=4, continues=True)
    assert parts.own == [[(0, 6, 0), (6, 7, 6)], [(6, 6, 0), (7, 12, 0)]]
    assert spans(parts.even) == [(0, 6), (6, 12)]
    assert spans(parts.before) == [(0, 0), (6, 6)], "the second part begins with the second row"
    move = Move.of(parts.own, parts.even, 1)
    assert move == Move(sends=[[], [(0, 5)]], takes=[[(0, 1)], [(1, 6)]], rows=6)


@pytest.mark.parametrize("continues", [False, True])
def test_moves_are_permutations_and_borders_are_the_rows_before(continues: bool) -> None:
    """Played by hand on all ranks at once, the way there and the way back, for many counts."""
    draw = random.Random(0)
    for _ in range(200):
        ranks, rows, window = draw.randint(1, 5), draw.randint(1, 3), draw.randint(1, 9)
        parts = Parts.of(
            [[draw.choice([0, 0, 1, 5, 12]) for _ in range(rows)] for _ in range(ranks)], window, continues
        )
        held = [[number for run in runs for number in range(*run[:2])] for runs in parts.own]
        even = play(held, parts.own, parts.even)
        total = sum(map(len, held))
        assert sum(even, []) == list(range(total))
        assert max(map(len, even)) - min(map(len, even)) <= 1
        assert play(even, parts.even, parts.own) == held
        before = play(even, parts.even, parts.before)
        for mine, part in zip(before, parts.even, strict=True):
            assert mine == list(range(part[0].first - len(mine), part[0].first))
            assert len(mine) <= window


def play(held: list[list[int]], have: Holding, want: Holding) -> list[list[int]]:
    moves = [Move.of(have, want, rank) for rank in range(len(held))]
    out = [[-1] * move.rows for move in moves]
    for sender, move in enumerate(moves):
        for taker, sent in enumerate(move.sends):
            numbers = [held[sender][i] for first, last in sent for i in range(first, last)]
            places = [i for first, last in moves[taker].takes[sender] for i in range(first, last)]
            for place, number in zip(places, numbers, strict=True):
                out[taker][place] = number
    return out


def test_what_is_worth_the_way() -> None:
    """Of 1B parameters, 8 pieces of about 40,000 active rows: on NVLink a fifth too many is, a hundredth is not."""
    config = SeqBoatConfig(block="scaled", vocab_size=256, layers=1, width=2048, value_dim=2048, heads=16)
    near, far = Price.of(config, 1, near=True), Price.of(config, 1, near=False)
    mean = 40_000
    fifth, hundredth = (
        Parts.of([[mean + extra], *[[mean - extra // 7]] * 7], 1024, continues=True) for extra in (8_000, 400)
    )
    assert near.worth(fifth)
    assert not near.worth(hundredth)
    assert not far.worth(fifth)
    assert ALWAYS.worth(hundredth)
    assert Price.of(config, 2, near=True).row < near.row, "ranks that compute a row together wait less for it"
