"""Token shards: uncompressed webdataset tars whose token members are also plain byte ranges for mmap.

One sample is a block of whole documents, three members under one key: `.tokens.npy` (tokens of all documents),
`.doclens.npy` (u4, tokens of each document), `.meta.json`. The same tokens always give the same bytes.
"""

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

import numpy as np

from megaboat.errors import BadInput

FORMAT = "megaboat-tokens/1"
TAR_RECORD = 512
NPY_HEADER = 128
CHUNK_TOKENS = 1 << 16  # one crc each: about one read-ahead, so that checking does not amplify cold reads
BLOCK_DTYPE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("n_tokens", "<u4"), ("n_docs", "<u4")])


@dataclass(frozen=True)
class Block:
    """Whole documents, end to end. `tokens` (n,) in the dataset's dtype, `doclens` (docs,) u4 that sum to n."""

    tokens: np.ndarray
    doclens: np.ndarray
    n_text_bytes: int
    first_document: int


@dataclass
class ShardRecord:
    """What the index keeps of a written shard; offsets are of the first token's byte in the tar."""

    file: str
    size: int = 0
    sha256: str = ""
    n_text_bytes: int = 0
    offsets: list[int] = field(default_factory=list)
    n_tokens: list[int] = field(default_factory=list)
    n_docs: list[int] = field(default_factory=list)
    crcs: list[int] = field(default_factory=list)
    max_id: int = 0


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of u1, u2, u4 that holds every id."""
    return np.dtype("|u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


def doclens_offset(tokens_offset: int, n_tokens: int, itemsize: int) -> int:
    """Byte offset of a block's first document length: the member after its tokens."""
    end = tokens_offset + n_tokens * itemsize
    return -(-end // TAR_RECORD) * TAR_RECORD + TAR_RECORD + NPY_HEADER


def write_shard(folder: Path, file: str, blocks: Iterable[Block], source: str, tokenizer_id: str) -> ShardRecord:
    """Write `folder/file` whole or not at all, and describe it. `file` is `<split>/<source>-<shard>.tar`."""
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    record = ShardRecord(file)
    with temporary.open("wb") as raw:
        sink = _HashingFile(raw)
        with tarfile.open(fileobj=cast(IO[bytes], sink), mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, block in enumerate(blocks):
                _add_block(tar, record, f"{path.stem}-{number:05d}", block, source, tokenizer_id)
        raw.flush()
        os.fsync(raw.fileno())
    record.size, record.sha256 = sink.position, sink.digest.hexdigest()
    temporary.rename(path)
    return record


def chunk_crcs(tokens: np.ndarray) -> list[int]:
    """crc32 of every 64 Ki tokens of a block, the last chunk being shorter."""
    view = tokens.view(np.uint8)
    step = CHUNK_TOKENS * tokens.itemsize
    return [zlib.crc32(view[start : start + step].data) for start in range(0, view.size, step)]


class _HashingFile:
    """A write-only file that knows its position and its sha256."""

    def __init__(self, file: io.BufferedWriter):
        self._file, self.position, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.position += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.position


def _add_block(
    tar: tarfile.TarFile, record: ShardRecord, key: str, block: Block, source: str, tokenizer_id: str
) -> None:
    n_tokens, n_docs = len(block.tokens), len(block.doclens)
    meta = {
        "first_document": block.first_document,
        "format": FORMAT,
        "n_docs": n_docs,
        "n_text_bytes": block.n_text_bytes,
        "n_tokens": n_tokens,
        "source": source,
        "tokenizer": tokenizer_id,
    }
    offset = tar.offset + TAR_RECORD + NPY_HEADER
    _add_member(tar, f"{key}.tokens.npy", _npy(block.tokens))
    _add_member(tar, f"{key}.doclens.npy", _npy(block.doclens.astype("<u4")))
    _add_member(tar, f"{key}.meta.json", json.dumps(meta, sort_keys=True).encode())
    record.offsets.append(offset)
    record.n_tokens.append(n_tokens)
    record.n_docs.append(n_docs)
    record.n_text_bytes += block.n_text_bytes
    record.crcs += chunk_crcs(block.tokens)
    record.max_id = max(record.max_id, int(block.tokens.max()))


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # its defaults: mtime 0, uid and gid 0, mode 644
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    data = buffer.getvalue()
    assert len(data) == NPY_HEADER + array.nbytes, "the layout counts on numpy's 128-byte header"
    return data


def check_vocabulary(ids: np.ndarray, vocab_size: int, what: str) -> None:
    """Raise BadInput if an id does not fit the vocabulary that the index will name."""
    if ids.size and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
        raise BadInput(f"{what}: token id {int(ids.max()):,} is outside the vocabulary of {vocab_size:,}")
