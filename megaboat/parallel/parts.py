"""Which rank computes which active rows, where ranks share them, and whether that is worth the way.

Arithmetic on the host with numbers that all ranks of the group know, so that all come to the same parts. The rows of
all ranks are numbered through: in the order of the text, batch row by batch row.
"""

from itertools import accumulate
from typing import NamedTuple

from megaboat.model.config import SeqBoatConfig
from megaboat.model.flops import unit_flops

Span = tuple[int, int]
"""[first, last) of a tensor's rows."""


class Run(NamedTuple):
    """Rows [first, last) of all ranks, which lie one after the other from `place` on in a tensor of one rank."""

    first: int
    last: int
    place: int = 0

    def common(self, other: "Run") -> Span | None:
        """What both hold, where this one has it; None: nothing."""
        first, last = max(self.first, other.first), min(self.last, other.last)
        return (first - self.first + self.place, last - self.first + self.place) if first < last else None


Holding = list[list[Run]]
"""For each rank of the group, in its order."""


class Move(NamedTuple):
    """Rows on their way between ranks, as one rank sees it: to and from each rank of the group, in their order."""

    sends: list[list[Span]]
    takes: list[list[Span]]
    rows: int
    """Of the tensor that they come to lie in."""

    @staticmethod
    def of(have: Holding, want: Holding, rank: int) -> "Move":
        """From where the rows are to where they are wanted; several ranks may want the same."""
        sends = [_common(have[rank], theirs) for theirs in want]
        takes = [[w.common(h) for h in theirs for w in want[rank]] for theirs in have]
        rows = sum(run.last - run.first for run in want[rank])
        return Move(sends, [[span for span in spans if span] for spans in takes], rows)

    def back(self, rows: int) -> "Move":
        """The way of the gradients, to a tensor of so many rows."""
        return Move(self.takes, self.sends, rows)


class Parts(NamedTuple):
    """Who has which rows, who computes which, and which ones before these their queries may attend to."""

    own: Holding
    even: Holding
    before: Holding
    """Up to a window of rows of the batch row that a part begins in."""
    seen: Holding
    """`before` and `even` in one."""

    @staticmethod
    def of(counts_SB: list[list[int]], window: int, continues: bool) -> "Parts":
        """counts: the active rows of each rank's batch rows. `continues`: these go on from rank to rank."""
        ranks, rows = range(len(counts_SB)), range(len(counts_SB[0]))
        order = [(s, b) for b in rows for s in ranks] if continues else [(s, b) for s in ranks for b in rows]
        starts = [0, *accumulate(counts_SB[s][b] for s, b in order)]
        start = dict(zip(order, starts, strict=False))
        own = []
        for s in ranks:
            places = [0, *accumulate(counts_SB[s])]
            own.append([Run(start[s, b], start[s, b] + counts_SB[s][b], places[b]) for b in rows])
        opening = [start[s, b] for s, b in order if s == 0 or not continues]
        total = starts[-1]
        cuts = [total * r // len(ranks) for r in (*ranks, len(ranks))]
        firsts = [max(cut - window, max(place for place in opening if place <= cut)) for cut in cuts[:-1]]
        return Parts(
            own,
            even=[[Run(cut, end)] for cut, end in zip(cuts, cuts[1:], strict=False)],
            before=[[Run(first, cut)] for first, cut in zip(firsts, cuts, strict=False)],
            seen=[[Run(first, end)] for first, end in zip(firsts, cuts[1:], strict=True)],
        )

    def most(self) -> tuple[int, int, int]:
        """Rows of the busiest rank as they lie, and as they are cut evenly; those that most cross one rank's link."""
        own, even = ([_size(runs) for runs in holding] for holding in (self.own, self.even))
        stay = [
            sum(last - first for first, last in _common(mine, part))
            for mine, part in zip(self.own, self.even, strict=True)
        ]
        moved = [max(o, e) - s for o, e, s in zip(own, even, stay, strict=True)]
        return max(own), max(even), max(moved)


class Price(NamedTuple):
    """Seconds of a forward pass. In the backward pass a row computes twice as long and moves as far."""

    row: float
    """To compute one."""
    way: float
    """Of one to another rank and its output back."""
    fixed: float
    """Of a layer: collectives, launches, the host's arithmetic."""

    @staticmethod
    def of(config: SeqBoatConfig, tensor: int, near: bool) -> "Price":
        """In bf16, on GPUs of this kind; `tensor` of them compute a row together. `near`: NVLink joins the ranks."""
        flops = unit_flops(config, tensor)
        row = (flops.row + flops.pair * (config.window + 1)) / tensor
        return Price(row / ACHIEVED, 2 * 2 * config.width / (NVLINK if near else NETWORK), LAYER)

    def worth(self, parts: Parts) -> bool:
        """Whether the busiest rank gains more than moving takes: its neighbours wait for it in every layer."""
        own, even, moved = parts.most()
        return (own - even) * self.row > moved * self.way + self.fixed


# FLOP/s of the unit, and bytes/s each way, on an H200; seconds.
ACHIEVED, NVLINK, NETWORK, LAYER = 400e12, 400e9, 50e9, 200e-6
ALWAYS = Price(0.0, 0.0, -1.0)


def _common(mine: list[Run], theirs: list[Run]) -> list[Span]:
    return [span for run in mine for other in theirs if (span := run.common(other))]


def _size(runs: list[Run]) -> int:
    return sum(run.last - run.first for run in runs)
