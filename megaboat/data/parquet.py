"""Rows of a parquet file, each as the line of jsonl that it would be. The only file that imports pyarrow, an extra."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megaboat.data.lines import BrokenInput, Line
from megaboat.errors import BadInput

ROWS = 1024  # read at a time
# For a row that holds no UTF-8: as a line it is refused for just this.
_NOT_UTF8 = b'{"text": "\xff"}'


def read_parquet(
    path: Path, max_line_bytes: int, on_read: Callable[[int], object], keys: Sequence[str]
) -> Iterator[Line]:
    """Every row in order, numbered from 1, with the values at `keys` (dotted paths) alone.

    Raises BadInput without pyarrow or without a column keys[0]; BrokenInput, after the last whole row group before
    the damage, for a file that is damaged: as far as the format tells, which has checksums only where its writer
    put them (`write_page_checksum`).
    """
    pyarrow = _import_pyarrow(path)
    size = path.stat().st_size
    number = offset = trusted = told = 0
    position = size  # of what is read now; at first that is the footer
    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        columns = _columns(path, file, keys)
        for group in range(file.num_row_groups):
            position = _start(file, group)
            on_read(position - told)
            told = position
            for data in _records(file, group, columns):
                number += 1
                yield Line(number, offset, data if len(data) <= max_line_bytes else None)
                offset += len(data) + 1
            trusted = offset
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno:
            raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
        reason = " ".join(str(error).split())
        raise BrokenInput(path, f"damaged or not parquet ({reason})", position, trusted) from None
    on_read(size - told)


def _import_pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise BadInput(f"{path}: parquet files are read by pyarrow: pip install pyarrow") from None
    return pyarrow


def _columns(path: Path, file: Any, keys: Sequence[str]) -> list[str]:
    known = [file.schema.column(number).path for number in range(len(file.schema.names))]
    if keys[0] not in known:
        raise BadInput(f"{path}: no column {keys[0]!r}; it has {', '.join(known)}: name one with --text-key")
    return [key for key in dict.fromkeys(keys) if key in known]


def _records(file: Any, group: int, columns: list[str]) -> Iterator[bytes]:
    """Every row of a row group as JSON."""
    for batch in file.iter_batches(ROWS, row_groups=[group], columns=columns):
        yield from _as_json(batch)


def _as_json(batch: Any) -> Iterator[bytes]:
    try:
        for row in batch.to_pylist():
            yield json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            yield _NOT_UTF8
            return
        for row in range(batch.num_rows):
            yield from _as_json(batch.slice(row, 1))


def _start(file: Any, group: int) -> int:
    """The first byte of a row group."""
    column = file.metadata.row_group(group).column(0)
    return column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
