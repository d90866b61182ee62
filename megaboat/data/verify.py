"""`megaboat data verify`: is a dataset, byte for byte and count for count, what its index says?"""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from megaboat.data.files import read_table, sha256_of_file, sha256_of_json
from megaboat.data.index import INDEX_FILE, read_index
from megaboat.data.pool import Report, run_jobs
from megaboat.data.shards import FORMAT, chunk_crcs
from megaboat.errors import DamagedData, MegaboatError

MEMBERS = ("tokens.npy", "doclens.npy", "meta.json")


@dataclass(frozen=True)
class ShardCheck:
    """One shard, and all that the index and its tables say of it."""

    folder: Path
    file: str
    size: int
    sha256: str
    source: str
    tokenizer_id: str
    vocab_size: int
    dtype: str
    blocks: np.ndarray  # BLOCK_DTYPE
    crcs: np.ndarray


def verify_dataset(folder: Path, workers: int = 1, progress: bool = False) -> list[str]:
    """Check every file of a dataset; return what is wrong, one line each, in the order of the index.

    Raises BadInput if there is no dataset.
    """
    index = read_index(folder)
    faults = _check_small_files(folder, index)
    if faults:
        return faults  # without sound tables shards cannot be judged
    jobs = _shard_checks(folder, index)
    found: dict[str, str] = {}
    with tqdm(
        total=sum(job.size for job in jobs), desc="verify", unit="B", unit_scale=True, disable=not progress
    ) as bar:
        for job, result in run_jobs(check_shard, jobs, min(workers, len(jobs)), bar):
            if isinstance(result, MegaboatError):
                found[job.file] = str(result)
    return [found[job.file] for job in jobs if job.file in found]


def check_shard(job: ShardCheck, report: Report) -> None:
    """Raise DamagedData with the first fault: size, tar headers, arrays, counts, crcs, sha256, in this order.

    The narrow checks come first, since they say where the fault lies.
    """
    path = job.folder / job.file
    if not path.is_file():
        _fail(path, "is missing")
    data = path.read_bytes()
    report(len(data), 0)
    if len(data) != job.size:
        _fail(path, f"{len(data):,} bytes; {INDEX_FILE} says {job.size:,}")
    blocks = _read_members(path, data, job)
    if len(blocks) != len(job.blocks):
        _fail(path, f"{len(blocks)} blocks can be read; {INDEX_FILE} says {len(job.blocks)}")
    crcs: list[int] = []
    for number, (row, members) in enumerate(zip(job.blocks, blocks, strict=True)):
        crcs += _check_block(f"{path}: block {number}", row, members, job)
    if not np.array_equal(crcs, job.crcs):
        chunk = int(np.argmax(np.array(crcs) != job.crcs))
        _fail(path, f"crc {chunk} differs")
    if sha256_of_file(path) != job.sha256:
        _fail(path, "sha256 differs, though tokens and counts are right; a header or padding is damaged")


def _check_small_files(folder: Path, index: dict[str, Any]) -> list[str]:
    expected = {index["tokenizer"]["file"]: index["tokenizer"]["sha256"]} if index["tokenizer"]["file"] else {}
    for sources in index["splits"].values():
        for entry in sources.values():
            expected |= {entry["blocks_file"]: entry["blocks_sha256"], entry["crc_file"]: entry["crc_sha256"]}
    faults = []
    for name, sha256 in expected.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{path}: is missing")
        elif sha256_of_file(path) != sha256:
            faults.append(f"{path}: sha256 differs from {INDEX_FILE}")
    if sha256_of_json(index["preprocess"]["options"]) != index["preprocess"]["sha256"]:
        faults.append(f"{folder / INDEX_FILE}: the hash of the options is not theirs")
    return faults


def _shard_checks(folder: Path, index: dict[str, Any]) -> list[ShardCheck]:
    checks = []
    for sources in index["splits"].values():
        for source, entry in sources.items():
            blocks, crcs = read_table(folder / entry["blocks_file"]), read_table(folder / entry["crc_file"])
            chunks = -(-blocks["n_tokens"].astype(np.int64) // (1 << 16))
            crc_of_shard = np.repeat(blocks["shard"], chunks)
            checks += [
                ShardCheck(
                    folder=folder,
                    file=shard["file"],
                    size=shard["size"],
                    sha256=shard["sha256"],
                    source=source,
                    tokenizer_id=index["tokenizer"]["content_id"],
                    vocab_size=index["vocab_size"],
                    dtype=index["dtype"],
                    blocks=blocks[blocks["shard"] == number],
                    crcs=crcs[crc_of_shard == number],
                )
                for number, shard in enumerate(entry["shards"])
            ]
    return checks


def _read_members(path: Path, data: bytes, job: ShardCheck) -> list[dict[str, Any]]:
    """The members of each block, read as any tar reader would; `offset` is where the tokens begin."""
    blocks: list[dict[str, Any]] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for info in tar:
                _read_member(path, tar, info, blocks)
    except (tarfile.TarError, ValueError, EOFError, MemoryError, RecursionError) as error:
        _fail(path, f"block {max(len(blocks) - 1, 0)} cannot be read: {error}")
    return blocks


def _read_member(path: Path, tar: tarfile.TarFile, info: tarfile.TarInfo, blocks: list[dict[str, Any]]) -> None:
    """Add a member to the block that it belongs to; its tokens begin a new one."""
    key, _, kind = info.name.partition(".")
    if not info.isreg() or info.issparse():
        _fail(path, f"unexpected member {info.name!r}: no plain file")  # a link, a device, a hole of terabytes
    if kind == MEMBERS[0]:
        blocks.append({"key": key})
    content = tar.extractfile(info)
    if kind not in MEMBERS or content is None or not blocks or blocks[-1]["key"] != key:
        _fail(path, f"unexpected member {info.name!r}")
    raw = content.read()
    if kind.endswith(".json"):
        blocks[-1][kind] = json.loads(raw)
        return
    blocks[-1][kind] = array = np.load(io.BytesIO(raw), allow_pickle=False)
    blocks[-1].setdefault("offset", info.offset_data + len(raw) - array.nbytes)


def _check_block(where: str, row: np.void, members: dict[str, Any], job: ShardCheck) -> list[int]:
    """The crcs of a block whose members agree with each other and with the block table."""
    if any(kind not in members for kind in MEMBERS):
        raise DamagedData(f"{where}: a member is missing")
    tokens, doclens, meta = (members[kind] for kind in MEMBERS)
    counts = {"n_tokens": int(row["n_tokens"]), "n_docs": int(row["n_docs"])}
    expected = {**counts, "source": job.source, "tokenizer": job.tokenizer_id, "format": FORMAT}
    for key, value in expected.items():
        if meta.get(key) != value:
            raise DamagedData(f"{where}: meta.json says {key} {meta.get(key)!r}, the index {value!r}")
    if tokens.dtype != np.dtype(job.dtype) or len(tokens) != counts["n_tokens"]:
        raise DamagedData(
            f"{where}: {len(tokens):,} tokens of {tokens.dtype}, not {counts['n_tokens']:,} of {job.dtype}"
        )
    if len(doclens) != counts["n_docs"] or int(doclens.sum(dtype=np.int64)) != counts["n_tokens"]:
        raise DamagedData(f"{where}: document lengths do not sum to its tokens")
    if members["offset"] != int(row["offset"]):
        raise DamagedData(f"{where}: tokens begin at byte {members['offset']:,}, the index says {int(row['offset']):,}")
    if int(tokens.max()) >= job.vocab_size:
        raise DamagedData(f"{where}: token id {int(tokens.max()):,} is outside the vocabulary of {job.vocab_size:,}")
    return chunk_crcs(tokens)


def _fail(path: Path, what: str) -> NoReturn:
    raise DamagedData(f"{path}: {what}")
