"""Long-range ListOps by our own seeded generator, with the published settings (Tay et al. 2021, `lra_benchmarks`).

A tree of MIN, MAX, MED and SM (sum mod 10) over digits; the class is the value of the whole. From depth 1 to 9 a node
is an operator with a chance of 1/4, else a digit; an operator has 2 to 10 children. Kept are trees of 500 < length <
2,000, where a digit counts 1 and an operator 2 and its children: the number of symbols, since a sequence is `[MAX 3 [SM
1 2 ] 4 ]`, without the parentheses of the published files, whose own order and split cannot be made again.
"""

import hashlib
import multiprocessing
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megaboat.errors import BadInput, DamagedData

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
SYMBOLS = ("<pad>", *map(str, range(10)), *OPERATORS, "]")
PAD, CLOSE, FIRST_DIGIT, FIRST_OPERATOR = 0, len(SYMBOLS) - 1, 1, 11
CLASSES, MAX_DEPTH, MAX_ARGUMENTS, OPERATOR_SHARE = 10, 10, 10, 0.25
SPLITS = ("train", "val", "test")
CHUNK = 250  # trees drawn from one seed: chunks may be drawn in any number of processes


@dataclass(frozen=True)
class Trees:
    """Sequences of one split, one after the other, and their classes."""

    symbols: np.ndarray
    """uint8, of all trees."""
    border: np.ndarray
    """int64: tree i is symbols[border[i]:border[i + 1]]."""
    value: np.ndarray
    """uint8: the class of each tree."""

    def __len__(self) -> int:
        return len(self.value)

    def batch(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Padded symbols (B, longest) and classes (B,), int64."""
        parts = [self.symbols[self.border[i] : self.border[i + 1]] for i in index]
        padded = np.full((len(parts), max(map(len, parts))), PAD, dtype=np.int64)
        for row, part in zip(padded, parts, strict=True):
            row[: len(part)] = part
        return padded, self.value[index].astype(np.int64)


def draw_tree(generator: random.Random, low: int, high: int) -> tuple[list[int], int]:
    """Symbols and value of a tree with low < length < high."""
    while True:
        symbols: list[int] = []
        value = _grow(generator, 1, symbols, high)
        if value is not None and low < len(symbols):
            return symbols, value


def make_listops(folder: Path, counts: Sequence[int], lengths: tuple[int, int], seed: int) -> None:
    """Draw the splits into `folder`, each tree in one of them only; leaves alone what is there of the same settings."""
    settings = np.array([*counts, *lengths, seed])
    file = folder / "listops.npz"
    if file.is_file():
        with np.load(file) as held:
            if not np.array_equal(held["settings"], settings):
                raise BadInput(f"{file} was drawn with other settings {held['settings'].tolist()}: name another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    wanted = sum(counts)
    trees: dict[bytes, int] = {}
    bar = tqdm(total=wanted, unit="tree", desc="ListOps")
    for chunk in _chunks(lengths, seed):
        for symbols, value in chunk:
            if len(trees) < wanted:
                trees.setdefault(symbols, value)
        bar.n = len(trees)
        bar.refresh()
        if len(trees) == wanted:
            break
    bar.close()
    sequences = list(trees)
    temporary = folder / "listops.tmp.npz"
    np.savez(
        temporary,
        settings=settings,
        counts=np.array(counts),
        symbols=np.frombuffer(b"".join(sequences), np.uint8),
        border=np.cumsum([0, *map(len, sequences)], dtype=np.int64),
        value=np.array(list(trees.values()), np.uint8),
    )
    temporary.replace(file)


def open_listops(folder: Path) -> dict[str, Trees]:
    """The splits that `make_listops` drew."""
    with np.load(folder / "listops.npz") as held:
        counts, symbols, border, value = (held[name] for name in ("counts", "symbols", "border", "value"))
    if len(value) != counts.sum() or len(symbols) != border[-1]:
        raise DamagedData(f"{folder / 'listops.npz'} does not hold the trees that it counts; delete it")
    edge = np.concatenate([[0], np.cumsum(counts)])
    return {
        name: Trees(symbols, border[edge[i] : edge[i + 1] + 1], value[edge[i] : edge[i + 1]])
        for i, name in enumerate(SPLITS)
    }


def content_hash(splits: dict[str, Trees]) -> str:
    """sha256 of all symbols and classes: the same settings and seed give it on every machine."""
    digest = hashlib.sha256(splits["train"].symbols.tobytes())
    for trees in splits.values():
        digest.update(trees.value.tobytes())
    return digest.hexdigest()


def _chunks(lengths: tuple[int, int], seed: int) -> Iterator[list[tuple[bytes, int]]]:
    """Without end, in the order of their numbers, whatever the number of processes."""
    jobs = ((lengths, seed, number) for number in range(10**9))
    with multiprocessing.get_context("fork").Pool() as pool:
        ahead = 4 * multiprocessing.cpu_count()
        while True:
            yield from pool.imap(_chunk, [next(jobs) for _ in range(ahead)])


def _chunk(job: tuple[tuple[int, int], int, int]) -> list[tuple[bytes, int]]:
    lengths, seed, number = job
    generator = random.Random(f"{seed}/{number}")
    drawn = [draw_tree(generator, *lengths) for _ in range(CHUNK)]
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
