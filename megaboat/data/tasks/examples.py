"""What every classification task is, wherever its data come from: three splits of sequences with a class each."""

import hashlib
import itertools
import multiprocessing
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pydantic
from tqdm import tqdm

from megaboat.errors import BadInput, DamagedData

Count = Annotated[int, pydantic.Field(gt=0)]
SPLITS = ("train", "val", "test")
Example = tuple[bytes, int]  # what is drawn: a sequence of bytes and its class


class Batch(NamedTuple):
    """B examples of P sequences each (2 where pairs are compared), padded behind to the longest."""

    values_BT: np.ndarray
    """(B * P, T), a pair's sequences one behind the other: int64 symbols, or float32 numbers."""
    kept_BT: np.ndarray
    """bool (B * P, T): False at padding."""
    label_B: np.ndarray
    """int64 (B,)."""


@dataclass(frozen=True)
class Examples:
    """One split: its sequences end to end, and its classes."""

    values: np.ndarray
    """uint8 or int16, of all sequences."""
    border: np.ndarray
    """int64: sequence i is values[border[i]:border[i + 1]]."""
    label: np.ndarray
    """int64: the class of each example."""
    normal: tuple[float, float] | None = None
    """Mean and deviation that make numbers of the values; None: they are symbols."""

    def __len__(self) -> int:
        return len(self.label)

    @property
    def parts(self) -> int:
        """Sequences of an example."""
        return (len(self.border) - 1) // max(1, len(self.label))

    @property
    def longest(self) -> int:
        return int(np.diff(self.border).max(initial=0))

    def batch(self, index: np.ndarray) -> Batch:
        """The examples of these numbers."""
        sequences = (index[:, None] * self.parts + np.arange(self.parts)).flatten()
        parts = [self.values[self.border[i] : self.border[i + 1]] for i in sequences]
        length_B = np.array([len(part) for part in parts])
        kept_BT = np.arange(length_B.max()) < length_B[:, None]
        values_BT = np.zeros(kept_BT.shape, np.int64 if self.normal is None else np.float32)
        values_BT[kept_BT] = np.concatenate(parts)
        if self.normal is not None:
            values_BT[kept_BT] = (values_BT[kept_BT] - self.normal[0]) / self.normal[1]
        return Batch(values_BT, kept_BT, self.label[index].astype(np.int64))


@dataclass(frozen=True)
class Task:
    """The splits of one task."""

    splits: dict[str, Examples]
    symbols: int
    """Different symbols; 0: the sequences are of numbers."""
    classes: int

    @property
    def longest(self) -> int:
        return max(examples.longest for examples in self.splits.values())

    def content_hash(self) -> str:
        """sha256 of all sequences and classes: the same settings and files give it on every machine."""
        digest = hashlib.sha256()
        for examples in self.splits.values():
            first, end = examples.border[[0, -1]]
            for array in (examples.values[first:end], examples.border - first, examples.label):
                digest.update(array.tobytes())
        return digest.hexdigest()


def pack(
    sequences: Sequence[np.ndarray | bytes], labels: Sequence[int], normal: tuple[float, float] | None = None
) -> Examples:
    """Examples of sequences: arrays of one dtype, or bytes; as many to an example as there are to a label."""
    arrays = [np.frombuffer(each, np.uint8) if isinstance(each, bytes) else each for each in sequences]
    values = np.concatenate(arrays) if arrays else np.empty(0, np.uint8)
    border = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    return Examples(values, border, np.array(labels, np.int64), normal)


def draw_once(
    folder: Path, name: str, counts: Sequence[int], settings: Sequence[float], chunk: Callable[[Any], list[Example]]
) -> None:
    """Draw `counts` examples, all different, into `folder/name.npz`, and leave alone what is there of these settings.

    `chunk` draws the examples of chunk number n of ((*settings), n), so that any number of processes draws the same.
    """
    said = np.array([*counts, *settings])
    file = folder / f"{name}.npz"
    if file.is_file():
        (held,) = _read(file, "settings")
        if not np.array_equal(held, said):
            raise BadInput(f"{file} was drawn with other settings {held.tolist()}: name another task.folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    drawn = _draw(sum(counts), _in_order(chunk, settings), name)
    temporary = folder / f"{name}.tmp.npz"
    np.savez(
        temporary,
        settings=said,
        counts=np.array(counts),
        values=np.frombuffer(b"".join(drawn), np.uint8),
        border=np.cumsum([0, *map(len, drawn)], dtype=np.int64),
        label=np.array(list(drawn.values()), np.int64),
    )
    temporary.replace(file)


def open_drawn(folder: Path, name: str, normal: tuple[float, float] | None = None) -> dict[str, Examples]:
    """The splits that `draw_once` wrote."""
    counts, values, border, label = _read(folder / f"{name}.npz", "counts", "values", "border", "label")
    if len(label) != counts.sum() or len(values) != border[-1]:
        raise DamagedData(f"{folder / f'{name}.npz'} does not hold the examples that it counts; delete it")
    edge = np.concatenate([[0], np.cumsum(counts)])
    return {
        split: Examples(values, border[edge[i] : edge[i + 1] + 1], label[edge[i] : edge[i + 1]], normal)
        for i, split in enumerate(SPLITS)
    }


def _read(file: Path, *names: str) -> list[np.ndarray]:
    try:
        with np.load(file) as held:
            return [held[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedData(f"{file} cannot be read ({error}); delete it, and it is drawn again") from None


def _draw(wanted: int, chunks: Iterable[list[Example]], name: str) -> dict[bytes, int]:
    drawn: dict[bytes, int] = {}
    bar = tqdm(total=wanted, unit="example", desc=name)
    for chunk in chunks:
        for sequence, label in chunk:
            if len(drawn) < wanted:
                drawn.setdefault(sequence, label)
        bar.n = len(drawn)
        bar.refresh()
        if len(drawn) == wanted:
            break
    bar.close()
    return drawn


def _in_order(chunk: Callable[[Any], list[Example]], settings: Sequence[float]) -> Iterator[list[Example]]:
    """Without end, in the order of their numbers, whatever the number of processes."""
    jobs = ((tuple(settings), number) for number in itertools.count())
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        ahead = 4 * multiprocessing.cpu_count()
        while True:
            yield from pool.map(chunk, itertools.islice(jobs, ahead))
