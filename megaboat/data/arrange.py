"""Second half of `data prepare`, planning: duplicates out, documents in shuffled order, blocks and shards cut.

All of it is decided from the document tables alone, by hashes, so it is the same for any number of workers. Memory:
about 120 bytes a document of the largest source; the tables of all files are mapped from disk.
"""

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaboat.data.documents import slug
from megaboat.data.files import write_json
from megaboat.data.pool import Report
from megaboat.data.shards import Block, ShardRecord, write_shard
from megaboat.data.spill import DOCUMENT_DTYPE, SPLITS
from megaboat.errors import BadInput

# Documents compared at a time when looking for copies; more are handled in several passes over the tables.
DEDUP_DOCUMENTS = 20_000_000


@dataclass(frozen=True)
class Spilled:
    """A tokenised input file: its folder, whether it was given as validation or test data, and its sources' slugs."""

    work: Path
    given: bool
    sources: list[str]

    def table(self) -> np.ndarray:
        """(documents,) of DOCUMENT_DTYPE, sorted by split, source and uid; mapped, not read."""
        path = self.work / "documents.npy"
        if path.stat().st_size <= 192 + DOCUMENT_DTYPE.itemsize:
            return np.load(path)  # an empty array cannot be mapped
        return np.load(path, mmap_mode="r")


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: its documents, in order, as places in the spill files."""

    out: Path
    done: Path  # folder for the records of written shards
    file: str
    source: str
    tokenizer_id: str
    dtype: str
    spills: list[Path]
    documents: np.ndarray  # DOCUMENT_DTYPE
    spill_of: np.ndarray  # index into `spills`, one a document
    block_ends: list[int]  # in documents of this shard
    first_document: int

    @property
    def digest(self) -> str:
        """Hash of what the shard will hold, without the tokens themselves."""
        head = f"{self.file} {self.tokenizer_id} {self.dtype} {self.block_ends} {self.first_document}"
        columns = self.documents[["uid_high", "uid_low", "content", "n_tokens", "n_text_bytes"]]
        return hashlib.sha256(head.encode() + np.ascontiguousarray(columns).tobytes()).hexdigest()


def source_names(records: list[dict[str, Any]]) -> dict[str, str]:
    """{slug: name} over all files, sorted. Raises BadInput if two sources have one slug."""
    names: dict[str, str] = {}
    for name in sorted({name for record in records for name in record["sources"]}):
        other = names.setdefault(slug(name), name)
        if other != name:
            raise BadInput(f"sources {other!r} and {name!r} would share the file name {slug(name)!r}; rename one")
    return dict(sorted(names.items()))


def find_kept(files: list[Spilled], dedup: bool) -> list[np.ndarray]:
    """For each file, which rows of its table stay: of exact copies one does, given validation files stay whole."""
    tables = [file.table() for file in files]
    kept = [np.ones(len(table), bool) for table in tables]
    total = sum(map(len, tables))
    if total == 0 or not dedup:
        return kept
    passes = -(-total // DEDUP_DOCUMENTS)
    for number in range(passes):
        rows = [np.flatnonzero(table["content"] % np.uint64(passes) == number) for table in tables]
        chosen = [table[index] for table, index in zip(tables, rows, strict=True)]
        owner = np.repeat(np.arange(len(files)), [len(index) for index in rows])
        given = np.array([file.given for file in files])[owner]
        documents, row = np.concatenate(chosen), np.concatenate(rows)
        order = np.lexsort((documents["uid_low"], documents["uid_high"], ~given, documents["content"]))
        content = documents["content"][order]
        copy = np.zeros(len(order), bool)
        copy[1:] = content[1:] == content[:-1]
        dropped = order[copy & ~given[order]]
        for index in np.unique(owner[dropped]):
            kept[index][row[dropped[owner[dropped] == index]]] = False
    return kept


def plan_shards(
    files: list[Spilled],
    kept: list[np.ndarray],
    split: str,
    source: str,
    block_tokens: int,
    blocks_per_shard: int,
    template: dict[str, Any],
) -> list[ShardJob]:
    """Shards of one split of one source, its documents sorted by uid: a shuffle that every rerun repeats.

    `template` holds the fields of ShardJob that are the same for all shards.
    """
    documents, owner = _gather(files, kept, split, source)
    if not len(documents):
        return []
    block_ends = _cut_blocks(np.cumsum(documents["n_tokens"].astype(np.int64)), block_tokens)
    jobs = []
    for number, first_block in enumerate(range(0, len(block_ends), blocks_per_shard)):
        ends = block_ends[first_block : first_block + blocks_per_shard]
        start = block_ends[first_block - 1] if first_block else 0
        file = f"{split}/{source}-{number:05d}.tar"
        jobs.append(
            ShardJob(
                file=file,
                source=source,
                spills=[spilled.work / "tokens.bin" for spilled in files],
                documents=documents[start : ends[-1]],
                spill_of=owner[start : ends[-1]],
                block_ends=[end - start for end in ends],
                first_document=start,
                **template,
            )
        )
    return jobs


def write_job(job: ShardJob, report: Report) -> ShardRecord:
    """Write the shard's tar from the spill files, unless an earlier run has, and return its record."""
    done = job.done / f"{job.file}.json"
    if done.exists():
        noted = json.loads(done.read_text())
        path = job.out / job.file
        if noted["digest"] == job.digest and path.exists() and path.stat().st_size == noted["record"]["size"]:
            report(len(job.documents), 0)
            return ShardRecord(**noted["record"])
    record = write_shard(job.out, job.file, _blocks(job), job.source, job.tokenizer_id)
    write_json(done, {"digest": job.digest, "record": asdict(record)})
    report(len(job.documents), len(job.documents))
    return record


def _gather(files: list[Spilled], kept: list[np.ndarray], split: str, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Kept documents of a split of a source, sorted by uid, and the file of each."""
    chosen, owners = [np.zeros(0, DOCUMENT_DTYPE)], [np.zeros(0, np.int32)]
    for index, (file, keep) in enumerate(zip(files, kept, strict=True)):
        if source not in file.sources:
            continue
        table = file.table()
        low, high = _bounds(table, SPLITS.index(split), file.sources.index(source))
        mine = table[low:high][keep[low:high]]
        chosen.append(mine)
        owners.append(np.full(len(mine), index, np.int32))
    documents, owner = np.concatenate(chosen), np.concatenate(owners)
    order = np.lexsort((documents["uid_low"], documents["uid_high"]))
    return documents[order], owner[order]


def _bounds(table: np.ndarray, split: int, source: int) -> tuple[int, int]:
    """Where in a sorted table the rows of a source begin and end, by bisection: tables may be larger than memory."""

    def key(row: int) -> tuple[int, int]:
        return int(table["split"][row]), int(table["source"][row])

    rows = range(len(table))
    return bisect_left(rows, (split, source), key=key), bisect_right(rows, (split, source), key=key)


def _cut_blocks(ends: np.ndarray, block_tokens: int) -> list[int]:
    """Borders, in documents, of blocks of up to `block_tokens`; a longer document is a block of its own.

    `ends` (documents,) are running token counts.
    """
    borders: list[int] = []
    first = 0
    while first < len(ends):
        limit = (ends[first - 1] if first else 0) + block_tokens
        first = max(first + 1, int(np.searchsorted(ends, limit, side="right")))
        borders.append(first)
    return borders


def _blocks(job: ShardJob) -> Iterator[Block]:
    spills = {int(i): np.memmap(job.spills[i], dtype=job.dtype, mode="r") for i in np.unique(job.spill_of)}
    start = 0
    for end in job.block_ends:
        documents = job.documents[start:end]
        parts = [
            spills[int(owner)][int(row["offset"]) : int(row["offset"]) + int(row["n_tokens"])]
            for owner, row in zip(job.spill_of[start:end], documents, strict=True)
        ]
        text_bytes = int(documents["n_text_bytes"].sum(dtype=np.int64))
        yield Block(np.concatenate(parts), documents["n_tokens"], text_bytes, job.first_document + start)
        start = end
