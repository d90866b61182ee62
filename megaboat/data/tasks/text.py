"""Byte-level text classification, and pairs of texts, from a user's files."""

import json
from collections import defaultdict
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple

import pydantic

from megaboat.config import Section
from megaboat.data.tasks.examples import SPLITS, Task, pack
from megaboat.errors import BadInput

BYTES = 256
HELD_OUT = 10  # per cent of the texts, for validation and for the test, where the folder has no such split


class Text(Section):
    """Texts in folders named after their classes, or lines of JSON; as bytes.

    `CLASS/FILE`, or `train/CLASS/FILE` and `test/CLASS/FILE`, or `train.jsonl` with objects of `text` and `label`. A
    missing `test` or `val` is a tenth of the training texts, chosen by their content.
    """

    kind: Literal["text"]
    """Which task; each has keys of its own."""
    folder: Path
    """The texts."""
    classes: list[str] = []
    """Those to read; none: all that are there."""
    length: int = pydantic.Field(4_000, gt=0)
    """Bytes of a text that are read, from its beginning."""

    def open(self) -> Task:
        splits = _complete({split: list(self._read(split)) for split in SPLITS} | self._unsplit())
        classes = self.classes or sorted({item.label for items in splits.values() for item in items})
        if len(classes) < 2:
            raise BadInput(f"{self.folder}: texts of {len(classes)} classes; expected CLASS/FILE or train.jsonl in it")
        number = {name: i for i, name in enumerate(classes)}
        packed = {}
        for split, items in splits.items():
            kept = [item for item in items if item.label in number]
            if not kept:
                raise BadInput(f"{self.folder}: no text for {split} of the classes {', '.join(classes)}")
            packed[split] = pack([item.data for item in kept], [number[item.label] for item in kept])
        return Task(packed, BYTES, len(classes))

    def _read(self, split: str) -> Iterator["_Item"]:
        file = self.folder / f"{split}.jsonl"
        yield from _lines(file, self.length) if file.is_file() else _files(self.folder / split, self.length)

    def _unsplit(self) -> dict[str, list["_Item"]]:
        """Classes that stand in the folder itself are to train on."""
        if not self.folder.is_dir():
            raise BadInput(f"{self.folder}: no such folder")
        if (self.folder / "train").is_dir() or (self.folder / "train.jsonl").is_file():
            return {}
        return {"train": list(_files(self.folder, self.length))}


class Retrieval(Section):
    """Pairs of texts: do they belong together? Files `*train.tsv`, `*eval.tsv` (or `*val.tsv`) and `*test.tsv`.

    A line is a label (0 or 1), two texts, and between them nothing or two names: the ACL Anthology pairs of the Long
    Range Arena as they are published.
    """

    kind: Literal["retrieval"]
    """Which task; each has keys of its own."""
    folder: Path
    """The three files."""
    length: int = pydantic.Field(4_000, gt=0)
    """Bytes of a text that are read, from its beginning."""

    def open(self) -> Task:
        splits = {}
        for split in SPLITS:
            texts, labels = [], []
            for label, *pair in self._pairs(self._file(split)):
                texts += pair
                labels.append(label)
            splits[split] = pack(texts, labels)
        return Task(splits, BYTES, classes=2)

    def _file(self, split: str) -> Path:
        names = ("eval", "val") if split == "val" else (split,)
        found = sorted({file for name in names for file in self.folder.glob(f"*{name}.tsv")})
        if len(found) != 1:
            raise BadInput(f"{self.folder}: {len(found)} files *{names[0]}.tsv; expected one")
        return found[0]

    def _pairs(self, file: Path) -> Iterator[tuple[int, bytes, bytes]]:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                fields = line.rstrip(b"\r\n").split(b"\t")
                if len(fields) not in (3, 5) or fields[0].strip(b'"') not in (b"0", b"1", b"0.0", b"1.0"):
                    raise BadInput(f"{file}:{number}: expected a label 0 or 1 and two texts, with tabs between them")
                first, second = (text[: self.length] for text in fields[-2:])
                if not first or not second:
                    raise BadInput(f"{file}:{number}: an empty text")
                yield int(float(fields[0].strip(b'"'))), first, second


class _Item(NamedTuple):
    data: bytes
    label: str


def _lines(file: Path, length: int) -> Iterator[_Item]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                data, label = entry["text"].encode(), str(entry["label"])
            except (ValueError, KeyError, TypeError, AttributeError):
                raise BadInput(f'{file}:{number}: expected {{"text": "...", "label": "..."}}') from None
            if not data:
                raise BadInput(f"{file}:{number}: an empty text")
            yield _Item(data[:length], label)


def _files(folder: Path, length: int) -> Iterator[_Item]:
    """The files of each sub-folder, in the order of their names; empty ones and those with a leading dot are none."""
    for file in sorted(folder.glob("*/*")):
        if file.is_file() and not file.name.startswith("."):
            with file.open("rb") as text:
                data = text.read(length)
            if data:
                yield _Item(data, file.parent.name)


def _complete(splits: dict[str, list[_Item]]) -> dict[str, list[_Item]]:
    """With a tenth of the training texts for each split that is missing: by content, so no text is on both sides."""
    dealt = defaultdict(list, {split: items for split, items in splits.items() if items and split != "train"})
    missing = [split for split in SPLITS[1:] if split not in dealt]
    for item in splits["train"]:
        place = int.from_bytes(blake2b(item.data, digest_size=8).digest()) % 100 // HELD_OUT
        dealt[missing[place] if place < len(missing) else "train"].append(item)
    return {split: dealt[split] for split in SPLITS}
