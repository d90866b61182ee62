"""A line of a corpus file, and the error of a file that cannot be read to its end."""

from dataclasses import dataclass
from pathlib import Path

from megaboat.errors import BadInput


class BrokenInput(BadInput):
    """A file that cannot be read to its end.

    `trusted` counts the decompressed bytes that are certainly right: all of them when the file was merely cut,
    those of the frames before when a checksum failed.
    """

    def __init__(self, path: Path, reason: str, compressed_offset: int, trusted: int, note: str = ""):
        super().__init__(f"{path}: {reason} at byte {compressed_offset:,}{note}")
        self.path, self.reason, self.note = path, reason, note
        self.compressed_offset, self.trusted = compressed_offset, trusted

    def __reduce__(self) -> tuple[type, tuple[Path, str, int, int, str]]:
        """Exceptions cross the border between worker processes by their arguments."""
        return BrokenInput, (self.path, self.reason, self.compressed_offset, self.trusted, self.note)


@dataclass(frozen=True)
class Line:
    """One line without its line end. `data` is None when it was longer than allowed."""

    number: int  # from 1
    offset: int  # of its first byte, in the decompressed file
    data: bytes | None
