"""A prepared dataset, opened for reading: each source of each split is one long array of tokens, mapped from disk."""

import errno
import mmap
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from megaboat.data.files import read_table, sha256_of_file
from megaboat.data.index import INDEX_FILE, dataset_id, read_index
from megaboat.data.shards import BLOCK_DTYPE, CHUNK_TOKENS, doclens_offset
from megaboat.data.tokenizer import Tokenizer, open_tokenizer
from megaboat.errors import BadInput, DamagedData

# Document borders of recently read blocks are kept up to this much.
BORDER_CACHE_BYTES = 32 << 20
MADV_POPULATE_READ = 22  # since Linux 5.14; elsewhere the call is refused, and that is passed over


class DamagedBlock(DamagedData):
    """Tokens of a block are not what they were; `block` is its name, as `exclude_blocks` takes it."""

    def __init__(self, message: str, block: str = ""):
        super().__init__(message)
        self.block = block


def open_dataset(path: Path | str | None, verify: str = "lazy", excluded: Collection[str] = ()) -> "Dataset":
    """Open a folder written by `megaboat data prepare`; check that every shard is there and has its size.

    verify: "lazy" checks crcs when tokens are first touched, "full" all of them now but those of `excluded` blocks,
    "off" never. Raises BadInput if there is no dataset, DamagedData if it is not what its index says.
    """
    if path is None:
        raise BadInput("data.path is not set; it names a folder written by `megaboat data prepare`")
    return Dataset(Path(path), verify, excluded)


class Dataset:
    """The index, and a TokenSource for each split and source."""

    def __init__(self, path: Path, verify: str = "lazy", excluded: Collection[str] = ()):
        self.path, self.verify = path, verify
        self.index = read_index(path)
        self.dataset_id = dataset_id(path)
        self.vocab_size: int = self.index["vocab_size"]
        self.dtype = np.dtype(self.index["dtype"])
        if self.vocab_size > np.iinfo(self.dtype).max + 1:
            raise BadInput(
                f"{path}: a vocabulary of {self.vocab_size:,} does not fit tokens of type {self.dtype.name}; "
                "prepare the data again"
            )
        self.eos_id: int | None = self.index["eos_id"]
        self.bos_id: int | None = self.index["bos_id"] if self.index["preprocess"]["options"].get("bos") else None
        """Of documents that begin with it; None: they begin with their text."""
        self.splits: dict[str, list[str]] = {split: sorted(sources) for split, sources in self.index["splits"].items()}
        file = self.index["tokenizer"]["file"]
        self.tokenizer_path: Path | None = path / file if file else None
        self._sources: dict[tuple[str, str], TokenSource] = {}
        self._check_files()
        if verify == "full":
            for split, sources in self.splits.items():
                for source in sources:
                    self.source(split, source).check_all(excluded)

    def source(self, split: str, name: str) -> "TokenSource":
        """The tokens of one source. Raises BadInput for an unknown split or source."""
        if name not in self.splits.get(split, []):
            known = ", ".join(f"{s}/{n}" for s, names in self.splits.items() for n in names)
            raise BadInput(f"{self.path}: no source {split}/{name}; it has {known}")
        key = (split, name)
        if key not in self._sources:
            self._sources[key] = TokenSource(self, split, name)
        return self._sources[key]

    @property
    def start_id(self) -> int | None:
        """What is read before a document's text: bos where documents begin with it, else the eos of the one before."""
        return self.eos_id if self.bos_id is None else self.bos_id

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens. Raises DamagedData if the file beside the shards is another one."""
        tokenizer = open_tokenizer(self.tokenizer_path or self.index["tokenizer"]["name"])
        self.check_tokenizer(tokenizer.content_id, str(self.tokenizer_path))
        return tokenizer

    def check_tokenizer(self, content_id: str, what: str) -> None:
        """Raise BadInput unless `content_id` is that of the tokenizer which made the tokens."""
        expected = self.index["tokenizer"]["content_id"]
        if content_id != expected:
            raise BadInput(
                f"{what} has tokenizer {content_id[:16]}, but {self.path} was made with {expected[:16]}; "
                "use the dataset's own tokenizer or prepare the data again"
            )

    def _check_files(self) -> None:
        if self.tokenizer_path is not None and not self.tokenizer_path.is_file():
            raise DamagedData(f"{self.tokenizer_path}: tokenizer is missing; {INDEX_FILE} names it")
        sizes = {
            shard["file"]: shard["size"]
            for sources in self.index["splits"].values()
            for entry in sources.values()
            for shard in entry["shards"]
        }
        for file, size in sizes.items():
            path = self.path / file
            if not path.is_file():
                raise DamagedData(f"{path}: shard is missing; {INDEX_FILE} names it")
            found = path.stat().st_size
            if found != size:
                raise DamagedData(f"{path}: {found:,} bytes, but {INDEX_FILE} says {size:,}")


class TokenSource:
    """All tokens of one source of one split, end to end, for any number of threads. Positions count tokens."""

    def __init__(self, dataset: Dataset, split: str, name: str):
        entry: dict[str, Any] = dataset.index["splits"][split][name]
        self.split, self.name, self.label = split, name, entry["name"]
        self.n_tokens: int = entry["n_tokens"]
        self.n_docs: int = entry["n_docs"]
        self.n_text_bytes: int = entry["n_text_bytes"]
        self.dtype = dataset.dtype
        self._folder = dataset.path
        self._shards: list[str] = [shard["file"] for shard in entry["shards"]]
        self._blocks = self._table(entry["blocks_file"], entry["blocks_sha256"])
        self._crcs = self._table(entry["crc_file"], entry["crc_sha256"])
        if self._blocks.dtype != BLOCK_DTYPE or self._blocks.ndim != 1:
            raise DamagedData(f"{dataset.path / entry['blocks_file']}: not a table of blocks")
        lengths = self._blocks["n_tokens"].astype(np.int64)
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._check_tables(dataset.path / INDEX_FILE)
        # Looked up one at a time for every window: Python integers are quicker than numpy's.
        self._first_chunk = array("q", np.concatenate([[0], np.cumsum(-(-lengths // CHUNK_TOKENS))]).tobytes())
        self._shard_of = array("q", self._blocks["shard"].astype(np.int64).tobytes())
        self._bases = array("q", (self._blocks["offset"].astype(np.int64) // self.dtype.itemsize).tobytes())
        self._checked = bytearray([dataset.verify == "off"]) * len(self._crcs)
        self._maps: dict[int, np.ndarray] = {}
        self._mapped: dict[int, mmap.mmap] = {}
        self._borders: OrderedDict[int, np.ndarray] = OrderedDict()
        self._borders_lock = Lock()
        self._border_bytes = 0

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as stored, checked; a copy. Raises DamagedData, IndexError past the end."""
        out = np.empty((1, count), self.dtype)
        self.read_windows(np.array([start]), out)
        return out[0]

    def read_windows(self, starts: np.ndarray, out_NC: np.ndarray, rows: np.ndarray | None = None) -> list[np.ndarray]:
        """Fill row rows[i] (i if None) of out_NC from starts[i]; return, for each i, where in it documents start.

        Offsets are sorted int64 within [0, out_NC.shape[1]). Raises DamagedData where a crc is wrong, IndexError
        past the end.
        """
        count = out_NC.shape[1]
        if len(starts) and (starts.min() < 0 or starts.max() + count > self.n_tokens):
            last = starts.max() + count
            raise IndexError(f"{self.split}/{self.name} has {self.n_tokens:,} tokens; asked for up to {last:,}")
        blocks = np.searchsorted(self._starts, starts, side="right") - 1
        local = starts - self._starts[blocks]
        within = local + count <= self._blocks["n_tokens"][blocks]
        rows = np.arange(len(starts)) if rows is None else rows
        documents = []
        for i, block, start, whole in zip(rows.tolist(), blocks.tolist(), local.tolist(), within.tolist(), strict=True):
            if whole:
                out_NC[i] = self._tokens(block, start, start + count)
                documents.append(self._starts_within(block, start, start + count))
            else:
                documents.append(self._read_across(block, start, out_NC[i]))
        return documents

    def document_lengths(self) -> np.ndarray:
        """Tokens of every document, (n_docs,) int64, in order."""
        lengths = [np.diff(self._block_borders(block)) for block in range(len(self._blocks))]
        return np.concatenate(lengths)

    def check_all(self, excluded: Collection[str] = ()) -> None:
        """Check the crc of every chunk, but of blocks of these names. Raises DamagedBlock."""
        for block, row in enumerate(self._blocks):
            if not excluded or self.block_name(block) not in excluded:
                self._tokens(block, 0, int(row["n_tokens"]))

    def block_name(self, block: int) -> str:
        """`train/NAME-00000.tar:7` for the eighth block of a shard; `block` counts through all shards."""
        shard = self._shard_of[block]
        return f"{self._shards[shard]}:{block - self._first_block(shard)}"

    def find_block(self, name: str) -> tuple[int, int] | None:
        """Where the tokens of the block of that name begin and end; None if there is none."""
        shard, _, number = name.rpartition(":")
        if shard not in self._shards or not number.isdecimal():
            return None
        block = self._first_block(self._shards.index(shard)) + int(number)
        if block >= len(self._blocks) or self.block_name(block) != f"{shard}:{int(number)}":
            return None
        return int(self._starts[block]), int(self._starts[block + 1])

    def _read_across(self, block: int, start: int, row: np.ndarray) -> np.ndarray:
        """Fill a row from `start` within a block and on through the next ones; where in it documents start."""
        filled, documents = 0, []
        while filled < len(row):
            stop = min(start + len(row) - filled, int(self._blocks["n_tokens"][block]))
            row[filled : filled + stop - start] = self._tokens(block, start, stop)
            documents.append(self._starts_within(block, start, stop) + filled)
            filled, block, start = filled + stop - start, block + 1, 0
        return np.concatenate(documents)

    def _tokens(self, block: int, start: int, stop: int) -> np.ndarray:
        """A view of part of a block, its chunks checked."""
        tokens, base = self._map(block)
        first = self._first_chunk[block]
        for chunk in range(first + start // CHUNK_TOKENS, first + (stop - 1) // CHUNK_TOKENS + 1):
            if not self._checked[chunk]:
                self._check_chunk(block, chunk - first, tokens, base)
                self._checked[chunk] = True
        return tokens[base + start : base + stop]

    def _check_chunk(self, block: int, number: int, tokens: np.ndarray, base: int) -> None:
        start = number * CHUNK_TOKENS
        stop = min(start + CHUNK_TOKENS, int(self._blocks["n_tokens"][block]))
        self._load(block, (base + start) * self.dtype.itemsize, (base + stop) * self.dtype.itemsize)
        found = zlib.crc32(tokens[base + start : base + stop].view(np.uint8).data)
        if found != self._crcs[self._first_chunk[block] + number]:
            offset = (base + start) * self.dtype.itemsize
            self._damaged(block, f"wrong crc, tokens {start:,} to {stop:,}, byte offset {offset:,}")

    def _starts_within(self, block: int, start: int, stop: int) -> np.ndarray:
        borders = self._block_borders(block)
        return borders[borders.searchsorted(start) : borders.searchsorted(stop)] - start

    def _block_borders(self, block: int) -> np.ndarray:
        """First token of each document of a block, and the end of the last: (docs + 1,) int64."""
        with self._borders_lock:
            known = self._borders.get(block)
            if known is not None:
                self._borders.move_to_end(block)
                return known
        row = self._blocks[block]
        offset = doclens_offset(int(row["offset"]), int(row["n_tokens"]), self.dtype.itemsize)
        self._load(block, offset, offset + 4 * int(row["n_docs"]))
        raw = self._map(block)[0].view(np.uint8)[offset : offset + 4 * int(row["n_docs"])]
        borders = np.concatenate([[0], np.cumsum(raw.view("<u4"), dtype=np.int64)])
        if borders[-1] != row["n_tokens"]:
            self._damaged(block, f"document lengths do not sum to its tokens, byte offset {offset:,}")
        with self._borders_lock:
            if block not in self._borders:
                self._border_bytes += borders.nbytes
            self._borders[block] = borders
            while self._border_bytes > BORDER_CACHE_BYTES and len(self._borders) > 1:
                self._border_bytes -= self._borders.popitem(last=False)[1].nbytes
        return borders

    def _map(self, block: int) -> tuple[np.ndarray, int]:
        """The shard of a block as tokens (members start at multiples of 64 bytes), and where in it the block starts."""
        shard = self._shard_of[block]
        if shard not in self._maps:
            path = self._folder / self._shards[shard]
            try:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise DamagedData(f"{path}: shard cannot be mapped ({error})") from None
            self._mapped[shard] = mapped
            self._maps[shard] = np.frombuffer(mapped, self.dtype)
        return self._maps[shard], self._bases[block]

    def _first_block(self, shard: int) -> int:
        return int(np.searchsorted(self._blocks["shard"], shard))

    def _load(self, block: int, start: int, stop: int) -> None:
        """Have the kernel read bytes [start, stop) of a block's shard now, where a cut file or a dead disk is an error;
        met later, through the mapping, it would be a SIGBUS that ends the process without a word."""
        self._map(block)
        low = start - start % mmap.PAGESIZE
        try:
            self._mapped[self._shard_of[block]].madvise(MADV_POPULATE_READ, low, stop - low)
        except OSError as error:
            if error.errno in (errno.EFAULT, errno.EIO):
                self._damaged(block, f"byte offset {start:,} cannot be read: the file was cut, or its disk is dead")
        except ValueError:
            self._damaged(block, f"byte offset {start:,} is past the end of the file")

    def _damaged(self, block: int, what: str) -> None:
        name = self.block_name(block)
        shard, _, number = name.rpartition(":")
        raise DamagedBlock(f"{self._folder / shard}: block {number}: {what}", name)

    def _check_tables(self, index: Path) -> None:
        """Raises DamagedData where index and tables do not count the same."""
        counts = {
            "tokens": (self.n_tokens, int(self._starts[-1])),
            "documents": (self.n_docs, int(self._blocks["n_docs"].sum(dtype=np.int64))),
            "chunks": (len(self._crcs), int((-(-np.diff(self._starts) // CHUNK_TOKENS)).sum())),
            "shards": (len(self._shards), int(self._blocks["shard"].astype(np.int64).max(initial=-1)) + 1),
        }
        for what, (said, found) in counts.items():
            if said != found:
                raise DamagedData(f"{index}: {self.split}/{self.name} has {said:,} {what}, its blocks {found:,}")

    def _table(self, file: str, sha256: str) -> np.ndarray:
        path = self._folder / file
        if not path.is_file():
            raise DamagedData(f"{path}: missing; {INDEX_FILE} names it")
        if sha256_of_file(path) != sha256:
            raise DamagedData(f"{path}: not the file that {INDEX_FILE} names (sha256 differs)")
        return read_table(path)
