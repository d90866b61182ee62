"""Long-range ListOps by our own seeded generator, with the published settings (Tay et al. 2021, `lra_benchmarks`).

A tree of MIN, MAX, MED and SM (sum mod 10) over digits; the class is the value of the whole. From depth 1 to 9 a node
is an operator with a chance of 1/4, else a digit; an operator has 2 to 10 children. Kept are trees of 500 < length <
2,000, where a digit counts 1 and an operator 2 and its children: the number of symbols, since a sequence is `[MAX 3 [SM
1 2 ] 4 ]`, without the parentheses of the published files, whose own order and split cannot be made again.
"""

import random
from pathlib import Path
from typing import Literal

import pydantic

from megaboat.config import Section
from megaboat.data.tasks.examples import Count, Example, Task, draw_once, open_drawn

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
SYMBOLS = ("<pad>", *map(str, range(10)), *OPERATORS, "]")
CLOSE, FIRST_DIGIT, FIRST_OPERATOR = len(SYMBOLS) - 1, 1, 11
CLASSES, MAX_DEPTH, MAX_ARGUMENTS, OPERATOR_SHARE = 10, 10, 10, 0.25
CHUNK = 250  # trees drawn from one seed: chunks may be drawn in any number of processes


class ListOps(Section):
    """Long-range ListOps, drawn by the first run; as published by default."""

    kind: Literal["listops"] = "listops"
    """Which task; each has keys of its own."""
    folder: Path = Path("corpora/listops")
    """Where the drawn trees are kept."""
    counts: tuple[Count, Count, Count] = (96_000, 2_000, 2_000)
    """Trees to train on, to validate with, to test with."""
    lengths: tuple[int, int] = (500, 2_000)
    """Trees are longer than the first and shorter than the second."""
    seed: int = 0
    """Of the trees."""

    @pydantic.field_validator("lengths")
    @classmethod
    def _some_length_lies_between(cls, lengths: tuple[int, int]) -> tuple[int, int]:
        if max(4, lengths[0] + 1) >= lengths[1]:  # the smallest operator with its arguments has 4 symbols
            raise ValueError("no tree is longer than the first and shorter than the second")
        return lengths

    def open(self) -> Task:
        draw_once(self.folder, "listops", self.counts, (*self.lengths, self.seed), _chunk)
        return Task(open_drawn(self.folder, "listops"), len(SYMBOLS), CLASSES)


def draw_tree(generator: random.Random, low: int, high: int) -> tuple[list[int], int]:
    """Symbols and value of a tree with low < length < high."""
    while True:
        symbols: list[int] = []
        value = _grow(generator, 1, symbols, high)
        if value is not None and low < len(symbols):
            return symbols, value


def _chunk(job: tuple[tuple[int, int, int], int]) -> list[Example]:
    (low, high, seed), number = job
    generator = random.Random(f"{seed}/{number}")
    drawn = [draw_tree(generator, low, high) for _ in range(CHUNK)]
    return [(bytes(symbols), value) for symbols, value in drawn]


def _grow(generator: random.Random, depth: int, symbols: list[int], high: int) -> int | None:
    """Append a node of this depth and return its value; None as soon as the tree is too long."""
    if depth >= MAX_DEPTH or generator.random() > OPERATOR_SHARE:
        digit = generator.randint(0, 9)
        symbols.append(FIRST_DIGIT + digit)
        return digit if len(symbols) < high else None
    operator = generator.randrange(len(OPERATORS))
    symbols.append(FIRST_OPERATOR + operator)
    values = []
    for _ in range(generator.randint(2, MAX_ARGUMENTS)):
        value = _grow(generator, depth + 1, symbols, high)
        if value is None:
            return None
        values.append(value)
    symbols.append(CLOSE)
    return _apply(operator, values) if len(symbols) < high else None


def _apply(operator: int, values: list[int]) -> int:
    if operator == 2:
        ordered, middle = sorted(values), len(values) // 2
        return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
    return (min(values), max(values), 0, sum(values) % 10)[operator]
