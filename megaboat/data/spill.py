"""First half of `data prepare`: one input file to tokens on disk, with a table of its documents.

Work on a file is committed by its `done.json`, written last; a file that turns out to be damaged commits nothing.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pydantic

from megaboat.config import Section
from megaboat.data.documents import (
    SENTENCEPIECE_SPACE,
    SPLIT_STEPS,
    Document,
    Rejected,
    document_uid,
    is_validation,
    parse_line,
)
from megaboat.data.files import sha256_of_file, write_array, write_json, write_whole
from megaboat.data.lines import BrokenInput, Line
from megaboat.data.pool import Report
from megaboat.data.reader import is_plain_text, read_lines, read_whole
from megaboat.data.shards import check_vocabulary, token_dtype
from megaboat.data.tokenizer import BYTE_TOKENIZERS, Tokenizer, open_tokenizer
from megaboat.errors import BadInput

SPLITS = ("train", "val", "test")
DOCUMENT_DTYPE = np.dtype(
    [
        ("split", "u1"),
        ("source", "<u2"),
        ("uid_high", "<u8"),
        ("uid_low", "<u8"),
        ("content", "<u8"),
        ("offset", "<u8"),  # of the first token in the spill file, in tokens
        ("n_tokens", "<u4"),
        ("n_text_bytes", "<u4"),
        ("line_end", "<u8"),  # in the decompressed file, in bytes
    ]
)
MAX_SOURCE = np.iinfo(DOCUMENT_DTYPE["source"]).max
# A file is given up early when it goes wrong from its start.
EARLY_DOCUMENTS = 10_000
EARLY_BAD = 100


class PrepareOptions(Section):
    """What decides the content of a dataset, beside its inputs and tokenizer. Recorded and hashed in the index."""

    text_key: str = "text"
    source_key: str = "meta.pile_set_name"
    default_source: str | None = None
    """Source of documents that name none; None: they stop the run."""
    val_per_10k: int = pydantic.Field(50, ge=0, le=SPLIT_STEPS)
    """Documents in 10,000 held out of the training files by the hash of their text."""
    split_salt: str = "megaboat"
    dedup: Literal["exact", "off"] = "exact"
    bos: bool = False
    bad_lines: Literal["quarantine", "fail"] = "quarantine"
    max_bad_per_million: int = pydantic.Field(100, ge=0)
    """Share of quarantined lines that stops the run, once there are more than 100 of them."""
    surrogates: Literal["quarantine", "replace"] = "quarantine"
    empty: Literal["drop", "keep"] = "drop"
    allow_empty_files: bool = False
    salvage: bool = False
    """Keep the sound part of damaged files instead of failing them."""
    max_line_bytes: int = 1 << 28
    block_tokens: int = pydantic.Field(1 << 20, gt=0)
    blocks_per_shard: int = pydantic.Field(128, gt=0)


@dataclass(frozen=True)
class SpillJob:
    """One input file and where its work goes. `split` is "train" for files that are split by hash."""

    path: Path
    split: str
    work: Path
    tokenizer: str
    options: PrepareOptions


@dataclass
class _Tally:
    """What is counted and noted while a file is read."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    altered: int = 0  # texts that hold U+2581, which sentencepiece reads as a space
    bad: Counter[str] = field(default_factory=Counter)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    sources: dict[str, int] = field(default_factory=dict)
    table: list[np.ndarray] = field(default_factory=list)
    rows: list[tuple[int, ...]] = field(default_factory=list)
    salvaged: dict[str, Any] | None = None

    def add_row(self, row: tuple[int, ...]) -> None:
        """Note a document; rows are packed now and then, as tuples are ten times larger."""
        self.rows.append(row)
        if len(self.rows) >= 1 << 16:
            self.pack()

    def pack(self) -> None:
        """Move the rows into the table."""
        self.table.append(np.array(self.rows, dtype=DOCUMENT_DTYPE))
        self.rows.clear()


def spill(job: SpillJob, report: Report) -> dict[str, Any]:
    """Tokenise one file into `job.work`; return its record. Work that was finished before is not repeated.

    Raises BrokenInput for a damaged file, BadInput for content that the options do not allow.
    """
    stat = job.path.stat()
    identity = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    done = job.work / "done.json"
    if done.exists():
        record: dict[str, Any] = json.loads(done.read_text())
        if record["identity"] == identity:
            report(stat.st_size, 0)
            return record
    sha256 = sha256_of_file(job.path)
    tally = _Tally()
    write_whole(job.work / "tokens.bin", lambda file: _spill_lines(job, sha256, file, tally, report))
    if tally.documents == 0 and not job.options.allow_empty_files:
        raise BadInput(f"{job.path}: no document in it; --allow-empty-files accepts such files")
    tally.pack()
    table = np.concatenate(tally.table)
    if tally.salvaged:
        table = table[table["line_end"] <= tally.salvaged["trusted_bytes"]]
    write_array(job.work / "documents.npy", np.sort(table, order=["split", "source", "uid_high", "uid_low"]))
    record = {
        "identity": identity,
        "sha256": sha256,
        "documents": len(table),
        "empty": tally.empty,
        "altered": tally.altered,
        "bad": dict(tally.bad),
        "quarantine": tally.quarantine,
        "sources": list(tally.sources),
        "salvaged": tally.salvaged,
    }
    write_json(done, record)
    return record


def _spill_lines(job: SpillJob, sha256: str, file: BinaryIO, tally: _Tally, report: Report) -> None:
    """Write the tokens of every document, in the order of the lines; fill the tally."""
    tokenizer = open_tokenizer(job.tokenizer)
    try:
        for line, document in _documents(job, tokenizer, tally, report):
            ids = _encode(tokenizer, document.text, job.options.bos)
            if not len(ids):  # all of it is normalised away, and no symbol ends a document
                tally.empty += 1
                continue
            check_vocabulary(ids, tokenizer.vocab_size, f"{job.path}:{line.number}")
            file.write(ids.astype(token_dtype(tokenizer.vocab_size)).tobytes())
            tally.add_row(_row(job, sha256, line, document, len(ids), tally))
            tally.documents += 1
            report(0, 1)
            tally.tokens += len(ids)
            tally.altered += SENTENCEPIECE_SPACE in document.text
    except BrokenInput as fault:
        if not job.options.salvage:
            note = f"; nothing of its {tally.documents:,} readable documents is kept"
            raise BrokenInput(fault.path, fault.reason, fault.compressed_offset, fault.trusted, note) from None
        tally.salvaged = {
            "reason": fault.reason,
            "compressed_offset": fault.compressed_offset,
            "trusted_bytes": fault.trusted,
        }


def _documents(job: SpillJob, tokenizer: Tokenizer, tally: _Tally, report: Report) -> Iterator[tuple[Line, Document]]:
    """Every document to keep, with its line. A plain text is one, of the default source or of source "text"."""
    if not is_plain_text(job.path):
        keys = (job.options.text_key, job.options.source_key)
        for line in read_lines(job.path, job.options.max_line_bytes, lambda count: report(count, 0), keys):
            document = _accept(job, line, tally)
            if document is not None:
                yield line, document
        return
    data = read_whole(job.path, lambda count: report(count, 0))
    # A byte corpus may be cut within a character, as the customary parts of enwik8 are.
    errors = "surrogateescape" if tokenizer.name in BYTE_TOKENIZERS else "strict"
    try:
        text = data.decode(errors=errors)
    except UnicodeDecodeError as error:
        raise BadInput(f"{job.path}: invalid UTF-8 at byte {error.start:,}") from None
    if text.strip():
        yield Line(1, 0, data), Document(text, job.options.default_source or "text")


def _accept(job: SpillJob, line: Line, tally: _Tally) -> Document | None:
    """The line's document, None where it is empty or set aside. Raises BadInput where the options say stop."""
    options = job.options
    if line.data is not None and not line.data.strip():
        tally.empty += 1
        return None
    parsed = parse_line(line, options.text_key, options.source_key, options.surrogates == "replace")
    where = f"{job.path}:{line.number}:{line.offset}"
    if isinstance(parsed, Rejected):
        if options.bad_lines == "fail":
            raise BadInput(f"{where}: {parsed.reason}")
        tally.bad[parsed.reason] += 1
        tally.quarantine.append({"line": line.number, "offset": line.offset, "reason": parsed.reason})
        if len(tally.quarantine) > EARLY_BAD and line.number <= EARLY_DOCUMENTS:
            raise BadInput(f"{where}: {describe_bad(tally.bad)} among the first {line.number:,} lines; is this jsonl?")
        return None
    if not parsed.text.strip() and (options.empty == "drop" or not parsed.text):
        tally.empty += 1
        return None
    if parsed.source is None and options.default_source is None:
        raise BadInput(f"{where}: no {options.source_key!r}; --default-source NAME gives such documents a source")
    return parsed


def _encode(tokenizer: Tokenizer, text: str, bos: bool) -> np.ndarray:
    """Ids of a document with its eos, and its bos if asked for."""
    head = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    tail = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    return np.concatenate([np.array(head, np.int32), tokenizer.encode(text), np.array(tail, np.int32)])


def _row(job: SpillJob, sha256: str, line: Line, document: Document, n_tokens: int, tally: _Tally) -> tuple[int, ...]:
    assert line.data is not None
    content = document.content_hash
    # A plain text is a corpus of its own: it is held out by naming it, not by chance.
    divisible = job.split == "train" and not is_plain_text(job.path)
    held_out = divisible and is_validation(content, job.options.val_per_10k, job.options.split_salt)
    split = "val" if held_out else job.split
    source = document.source or job.options.default_source or ""
    number = tally.sources.setdefault(source, len(tally.sources))
    if number > MAX_SOURCE:
        raise BadInput(
            f"{job.path}:{line.number}: over {MAX_SOURCE:,} sources; {job.options.source_key!r} is no kind of text, "
            "name another --source-key"
        )
    return (
        SPLITS.index(split),
        number,
        *document_uid(sha256, line.number),
        content,
        tally.tokens,
        n_tokens,
        len(document.data),
        line.offset + len(line.data),
    )


def describe_bad(bad: Counter[str]) -> str:
    """`12 lines not JSON, 3 lines invalid UTF-8`, the most frequent first."""
    return ", ".join(f"{count:,} lines {reason}" for reason, count in bad.most_common())
