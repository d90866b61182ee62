"""Lines of a corpus file: jsonl or plain text, perhaps zst or gz, or parquet. The only file that imports zstandard.

A compressed stream that stops early decodes without an error in most readers; here every frame must reach its end,
or `BrokenInput` says where reading stopped and how much of what came before can be trusted.
"""

import glob
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import zstandard

from megaboat.data.lines import BrokenInput, Line
from megaboat.data.parquet import read_parquet
from megaboat.errors import BadInput

READ_BYTES = 1 << 16
# Archives written with `zstd --long=31` need the largest window that the format knows.
MAX_WINDOW = 1 << 31
MAX_DOCUMENT = 1 << 31  # of a text file, decompressed: a few kB of zeros would fill any memory
PLAIN_TEXT, BY_LINE = {".txt", ".xml"}, {".json", ".jsonl", ".parquet"}
UNREAD = {".arrow", ".bz2", ".xz", ".lz4", ".zip", ".tar"}


class Decompressor(Protocol):
    """What zlib's and zstandard's streaming objects have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def find_inputs(pattern: str, option: str = "--input") -> list[Path]:
    """The files that match a glob (`**` crosses folders), sorted. Raises BadInput if there is none."""
    paths = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
    if not paths:
        raise BadInput(f"{option} {pattern!r}: no such file; quote the pattern so that the shell leaves it whole")
    return paths


def is_plain_text(path: Path) -> bool:
    """Whether a file is one document as it stands (`.txt`, `.xml`), and not a document a line."""
    return bool(PLAIN_TEXT & set(path.suffixes)) and not BY_LINE & set(path.suffixes)


def read_whole(path: Path, on_read: Callable[[int], object] = lambda count: None) -> bytes:
    """All of a file, decompressed. Raises BrokenInput if it is damaged, BadInput if it is no document but a bomb."""
    chunks, size = [], 0
    for chunk in _chunks(path, on_read):
        size += len(chunk)
        if size > MAX_DOCUMENT:
            raise BadInput(f"{path}: one document of over {MAX_DOCUMENT:,} bytes; cut it, or prepare it as jsonl")
        chunks.append(chunk)
    return b"".join(chunks)


def read_lines(
    path: Path,
    max_line_bytes: int = 1 << 28,
    on_read: Callable[[int], object] = lambda count: None,
    keys: Sequence[str] = ("text",),
) -> Iterator[Line]:
    """Every line of the file in order. Raises BrokenInput, after the last whole line, if the file is damaged.

    `on_read` is told how many bytes of the file were read each time, for progress bars. `keys` are the dotted paths
    that will be asked for: of a parquet file nothing else is read, and its rows are the lines.
    """
    if path.suffix == ".parquet":
        yield from read_parquet(path, max_line_bytes, on_read, keys)
        return
    number, offset = 1, 0
    rest: list[bytes] = []
    rest_bytes = 0
    for chunk in _chunks(path, on_read):
        *whole, tail = chunk.split(b"\n")
        for piece in whole:
            rest.append(piece)
            rest_bytes += len(piece)
            fits = rest_bytes <= max_line_bytes
            yield Line(number, offset, b"".join(rest) if fits else None)
            number, offset = number + 1, offset + rest_bytes + 1
            rest, rest_bytes = [], 0
        rest_bytes += len(tail)
        rest.append(tail)
        if rest_bytes > max_line_bytes:
            rest = []  # the line is lost anyway: hold its length, not its bytes
    if rest_bytes:
        yield Line(number, offset, b"".join(rest) if rest_bytes <= max_line_bytes else None)


def _chunks(path: Path, on_read: Callable[[int], object]) -> Iterator[bytes]:
    if path.suffix in UNREAD:
        raise BadInput(f"{path}: {path.suffix} files are not read; jsonl, jsonl.zst, jsonl.gz, parquet and txt are")
    try:
        with path.open("rb") as file:
            told = _Told(file, on_read)
            kind = {".zst": "zstd", ".gz": "gzip"}.get(path.suffix)
            yield from _inflate(path, told, kind) if kind else iter(told.read, b"")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None


class _Told:
    """A file whose reader is watched."""

    def __init__(self, file: BinaryIO, on_read: Callable[[int], object]):
        self._file, self._on_read = file, on_read
        self.position = 0

    def read(self) -> bytes:
        chunk = self._file.read(READ_BYTES)
        self.position += len(chunk)
        self._on_read(len(chunk))
        return chunk


def _new_frame(kind: str) -> Decompressor:
    if kind == "gzip":
        return zlib.decompressobj(wbits=31)
    return zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()


def _inflate(path: Path, file: _Told, kind: str) -> Iterator[bytes]:
    """Decompressed chunks of one or several frames; the end of each must be reached."""
    frame: Decompressor | None = None
    given = trusted = 0  # decompressed bytes: handed out, and of frames that ended well
    while chunk := file.read():
        while chunk:
            if frame is None:
                frame, trusted = _new_frame(kind), given
            try:
                out = frame.decompress(chunk)
            except (zstandard.ZstdError, zlib.error) as error:
                position = file.position - len(chunk)
                reason = f"damaged or not {kind} ({error})"
                raise BrokenInput(path, reason, position, trusted) from None
            given += len(out)
            yield out
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        reason = f"truncated: the {kind} stream stops before the end of its frame"
        raise BrokenInput(path, reason, file.position, given)
