"""The order of the data: a pure function from the number of a window to its place in the corpus.

No generator, no stored index: window i is slot i % CYCLE of cycle i // CYCLE. A keyed permutation of the cycle's slots
decides its source, so mixtures are exact over a cycle; how often the source came before, a closed form plus a count
within the cycle, is its ordinal; another permutation, a new one every epoch, turns the ordinal into a place. Only
integer arithmetic and blake2b are used, so the order is the same in every version of every library.

Names: n windows asked for, k source, e epoch, L tokens per window.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np

from megaboat.data.files import sha256_of_json
from megaboat.errors import BadInput

CYCLE = 1 << 16
ROUNDS = 8


class Order(Protocol):
    """What the loader asks of an order."""

    def locate(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source index and first token within the source, both (n,) int64, of windows (n,) int64."""

    def drawn(self, windows: int) -> list[int]:
        """How many of the first `windows` windows come from each source."""

    def plan_id(self, windows: int) -> str:
        """Hash of everything that decides the first `windows` windows, and of nothing after them."""

    def windows_per_epoch(self) -> list[int]:
        """Windows in one epoch of each source."""


@dataclass(frozen=True)
class Stretch:
    """A phase of the plan with its weights made whole: slots of each source in a cycle; they sum to CYCLE."""

    from_window: int
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Hole:
    """Tokens [first, last) of source k that no window from `from_window` on touches."""

    from_window: int
    source: int
    first: int
    last: int


class ShuffledOrder:
    """Windows of weighted sources, each source permuted afresh every epoch.

    sources: {name: tokens}; group_tokens: windows of that many neighbouring tokens come together, 0 for a full
    shuffle; holes: what is left out. Raises BadInput for a source that is drawn from but shorter than two windows, or
    half of holes.
    """

    def __init__(
        self,
        sources: dict[str, int],
        stretches: list[Stretch],
        window: int,
        seed: int,
        group_tokens: int = 0,
        holes: tuple[Hole, ...] = (),
    ):
        self.names, self.window, self.seed = list(sources), window, seed
        self.group = group_tokens // window if group_tokens else 0
        self.stretches, self.holes = stretches, holes
        # One window less than fit: borders move by up to a window from epoch to epoch, and targets need one more.
        self._epoch = np.array([tokens // window - 1 for tokens in sources.values()], np.int64)
        for k, name in enumerate(self.names):
            if self._epoch[k] < 1 and any(stretch.slots[k] for stretch in stretches):
                raise BadInput(
                    f"source {name!r} has {sources[name]:,} tokens, fewer than two windows of {window:,}; shorten "
                    f"data.seq_len or leave {name!r} out of data.weights"
                )
        cycles = [(b.from_window - a.from_window) // CYCLE for a, b in zip(stretches, stretches[1:], strict=False)]
        steps = [np.array(a.slots, np.int64) * c for a, c in zip(stretches, cycles, strict=False)]
        self._base = np.cumsum([np.zeros(len(sources), np.int64), *steps], axis=0)
        self._slots = np.array([stretch.slots for stretch in stretches], np.int64)
        self._from = np.array([stretch.from_window for stretch in stretches], np.int64)
        self._cycles: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._check_holes()

    def locate(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        source, ordinal = self._draw(windows)
        epoch, position = np.divmod(ordinal, self._epoch[source])
        start = np.empty_like(ordinal)
        for k, e in {(int(k), int(e)) for k, e in zip(source, epoch, strict=True)}:
            mine = (source == k) & (epoch == e)
            label = f"{self.seed}:{self.names[k]}:{e}"
            place = self._shuffle(position[mine], int(self._epoch[k]), label)
            start[mine] = shift(label, self.window) + place * self.window
            if self.holes:
                start[mine] = self._around_holes(windows[mine], k, start[mine], label)
        return source, start

    def drawn(self, windows: int) -> list[int]:
        stretch = self._stretch_of(windows)
        cycles, slot = divmod(windows - int(self._from[stretch]), CYCLE)
        source, _ = self._cycle(windows // CYCLE)
        partial = np.bincount(source[:slot], minlength=len(self.names))
        return [int(n) for n in self._base[stretch] + cycles * self._slots[stretch] + partial]

    def plan_id(self, windows: int) -> str:
        used = [s for s in self.stretches if s.from_window < max(windows, 1)]
        plan: dict[str, Any] = {
            "cycle": CYCLE,
            "window": self.window,
            "seed": self.seed,
            "group": self.group,
            "sources": self.names,
            "windows_per_epoch": self.windows_per_epoch(),
            "stretches": [[s.from_window, list(s.slots)] for s in used],
        }
        holes = sorted([hole.from_window, hole.source, hole.first, hole.last] for hole in self.holes)
        if holes := [hole for hole in holes if hole[0] < max(windows, 1)]:
            plan["holes"] = holes
        return sha256_of_json(plan)

    def windows_per_epoch(self) -> list[int]:
        return [int(n) for n in self._epoch]

    def _draw(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source, and how many windows of it came before; both (n,) int64."""
        cycle, slot = np.divmod(windows, CYCLE)
        source = np.empty_like(slot)
        ordinal = np.empty_like(slot)
        for c in np.unique(cycle).tolist():
            mine = cycle == c
            stretch = self._stretch_of(c * CYCLE)
            cycles = c - int(self._from[stretch]) // CYCLE
            before = self._base[stretch] + cycles * self._slots[stretch]
            sources, ranks = self._cycle(c)
            source[mine] = sources[slot[mine]]
            ordinal[mine] = before[source[mine]] + ranks[slot[mine]]
        return source, ordinal

    def _cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """For each slot of a cycle its source, and how many earlier slots of the cycle have the same one."""
        known = self._cycles.get(cycle)
        if known is not None:
            return known
        slots = self._slots[self._stretch_of(cycle * CYCLE)]
        mixed = permute(np.arange(CYCLE), CYCLE, f"{self.seed}:mix:{cycle}")
        source = np.searchsorted(np.cumsum(slots), mixed, side="right")
        rank = np.empty(CYCLE, np.int64)
        rank[np.argsort(source, kind="stable")] = np.concatenate([np.arange(n) for n in slots])
        self._cycles = {cycle: (source, rank)}  # the one in use; another is 10 ms away
        return source, rank

    def _check_holes(self) -> None:
        for k, name in enumerate(self.names):
            touching = sum((hole.last - hole.first) // self.window + 2 for hole in self.holes if hole.source == k)
            if 2 * touching > self._epoch[k] and any(self._slots[:, k]) and touching:
                raise BadInput(
                    f"the excluded blocks of {name!r} leave less than half of its windows; leave {name!r} out of "
                    "data.weights or prepare the data again"
                )

    def _around_holes(self, windows: np.ndarray, k: int, start: np.ndarray, label: str) -> np.ndarray:
        """`start` (n,), but for windows that would touch a hole places elsewhere in the same epoch of source k.

        Each of a series of permutations is asked in turn; as more than half of the places are sound, few are.
        """
        count, tries = int(self._epoch[k]), 0
        lost = np.flatnonzero(self._touches_hole(windows, k, start))
        while lost.size:
            tries += 1
            place = permute((start[lost] - shift(label, self.window)) // self.window, count, f"{label}:instead:{tries}")
            start[lost] = shift(label, self.window) + place * self.window
            lost = lost[self._touches_hole(windows[lost], k, start[lost])]
        return start

    def _touches_hole(self, windows: np.ndarray, k: int, start: np.ndarray) -> np.ndarray:
        touches = np.zeros(len(windows), bool)
        for hole in self.holes:
            if hole.source == k:
                touches |= (windows >= hole.from_window) & (start < hole.last) & (start + self.window >= hole.first)
        return touches

    def _stretch_of(self, window: int) -> int:
        return int(np.searchsorted(self._from, window, side="right")) - 1

    def _shuffle(self, position: np.ndarray, count: int, label: str) -> np.ndarray:
        """Where in the epoch's `count` windows each position leads."""
        groups = count // self.group if self.group else 0
        if groups < 2:
            return permute(position, count, label)
        group, inside = np.divmod(position, self.group)
        group = np.where(group < groups, permute(np.minimum(group, groups - 1), groups, f"{label}:groups"), groups)
        place = np.empty_like(position)
        for g in np.unique(group):
            mine = group == g
            size = self.group if g < groups else count - groups * self.group
            place[mine] = g * self.group + permute(inside[mine], size, f"{label}:{g}")
        return place


class ContiguousOrder:
    """One source cut into as many lanes as the global batch has rows; each lane is read from end to end.

    Window i is step i // rows of lane i % rows. The lanes belong to the global batch, so they are the same at every
    world size, and another global batch is another plan.
    """

    def __init__(self, name: str, tokens: int, window: int, rows: int):
        self.names, self.window, self.rows = [name], window, rows
        self.steps = (tokens - 1) // rows // window
        if self.steps < 1:
            raise BadInput(
                f"source {name!r} has {tokens:,} tokens, too few for {rows:,} contiguous rows of {window:,}; "
                "shorten data.seq_len or the global batch"
            )

    def locate(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        step, lane = np.divmod(windows, self.rows)
        return np.zeros_like(windows), (lane * self.steps + step % self.steps) * self.window

    def drawn(self, windows: int) -> list[int]:
        return [windows]

    def plan_id(self, windows: int) -> str:
        return sha256_of_json({"window": self.window, "rows": self.rows, "steps": self.steps, "source": self.names})

    def windows_per_epoch(self) -> list[int]:
        return [self.steps * self.rows]


def slots_of(weights: list[float]) -> tuple[int, ...]:
    """Whole slots of a cycle in proportion to the weights, by largest remainder; they sum to CYCLE."""
    total = sum(weights)
    exact = [weight / total * CYCLE for weight in weights]
    slots = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda k: (slots[k] - exact[k], k))
    for k in by_remainder[: CYCLE - sum(slots)]:
        slots[k] += 1
    return tuple(slots)


def permute(x: np.ndarray, count: int, label: str) -> np.ndarray:
    """Where a permutation of range(count), chosen by the label, sends each x (n,) int64.

    A balanced Feistel network over the next even power of two; results beyond `count` are sent on until they fall
    within (cycle walking, less than four tries on average).
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    y = _feistel(x.astype(np.uint64), half, label)
    outside = np.flatnonzero(y >= count)
    while outside.size:
        y[outside] = _feistel(y[outside], half, label)
        outside = outside[y[outside] >= count]
    return y.astype(np.int64)


def shift(label: str, window: int) -> int:
    """How far an epoch's window borders are moved: 0 to window - 1 tokens."""
    return int.from_bytes(blake2b(f"{label}:shift".encode(), digest_size=8).digest(), "little") % window


def _feistel(x: np.ndarray, half: np.uint64, label: str) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in _round_keys(label):
        left, right = right, left ^ (_splitmix64(right + key) & mask)
    return (left << half) | right


@lru_cache(maxsize=4096)
def _round_keys(label: str) -> np.ndarray:
    return np.frombuffer(blake2b(label.encode(), digest_size=8 * ROUNDS).digest(), "<u8").astype(np.uint64)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of Steele, Lea and Flood's generator: every input bit reaches every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    shifted = x >> np.uint64(30)
    x ^= shifted
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= np.right_shift(x, np.uint64(27), out=shifted)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= np.right_shift(x, np.uint64(31), out=shifted)
    return x
