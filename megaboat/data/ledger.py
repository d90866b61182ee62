"""The audit of "the same tokens in the same steps": one line a step with a crc over the global batch."""

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megaboat.errors import DamagedData


@dataclass(frozen=True, slots=True)
class Entry:
    """A step, the first window of its global batch, `step_crc` of the batch, and why it changed no weights if so."""

    step: int
    first_window: int
    crc: int
    skipped: str | None = None

    def line(self) -> bytes:
        """The step's line in the file; `skipped` only where it was."""
        return json.dumps({key: value for key, value in asdict(self).items() if value is not None}).encode() + b"\n"


def step_crc(crcs: Sequence[int]) -> int:
    """crc32 over the crcs of all windows of a global batch, in their order: the same at every world size."""
    return zlib.crc32(np.array(crcs, "<u4").tobytes())


class Ledger:
    """`data_ledger.jsonl`, written by rank 0. A step that is repeated after a resume must repeat its entry.

    Raises DamagedData if the file holds a broken line before its last one.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._entries: dict[int, Entry] = {}
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        whole, torn = lines[:-1], lines[-1]
        for number, line in enumerate(whole, 1):
            try:
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError):
                raise DamagedData(f"{self.path}:{number}: not a ledger line") from None
            self._entries[entry.step] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        if torn:
            # A killed writer leaves half a line; its step is about to be repeated.
            self._file.truncate(sum(len(line) + 1 for line in whole))

    def append(self, step: int, first_window: int, crc: int, skipped: str | None = None) -> None:
        """Note a step. Raises DamagedData if it was noted before with other data."""
        entry = Entry(step, first_window, crc, skipped)
        before = self._entries.get(step)
        if before is not None and (before.first_window, before.crc) != (first_window, crc):
            raise DamagedData(
                f"{self.path}: step {step:,} used window {before.first_window:,} with crc {before.crc:08x}, "
                f"repeated it is window {first_window:,} with crc {crc:08x}; if other data are meant, "
                "data.accept_change=true takes them"
            )
        self._entries[step] = entry
        if before is None:
            self._file.write(entry.line())
            self._file.flush()
        elif before != entry:  # it went well once and is left out now
            self._write_all()

    def skipped(self) -> dict[int, str]:
        """The steps that changed no weights, with the reason: they are left out again when they are repeated."""
        return {step: entry.skipped for step, entry in self._entries.items() if entry.skipped}

    def forget_after(self, step: int) -> None:
        """Drop the entries of later steps: they will be done again with other data, and that is meant."""
        self._entries = {number: entry for number, entry in self._entries.items() if number <= step}
        self._write_all()

    def sync(self) -> None:
        """Put all lines on disk, so that a ledger is never behind a checkpoint."""
        os.fsync(self._file.fileno())

    def last(self) -> Entry | None:
        """The entry of the highest step."""
        return self._entries[max(self._entries)] if self._entries else None

    def entry(self, step: int) -> Entry | None:
        """The entry of a step."""
        return self._entries.get(step)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write_all(self) -> None:
        self._file.truncate(0)
        self._file.writelines(entry.line() for _, entry in sorted(self._entries.items()))
        self._file.flush()
