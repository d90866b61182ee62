"""index.json: what a dataset holds, with the hash of every part of it. Its own hash is the dataset's identity."""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic

from megaboat.data.files import check_inside, read_json, sha256_of_file, sha256_of_json, write_array
from megaboat.data.shards import BLOCK_DTYPE, FORMAT, ShardRecord, check_vocabulary, token_dtype
from megaboat.data.tokenizer import PRETOK, Tokenizer, trainer_version
from megaboat.errors import BadInput, DamagedData

INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.model"
Count = Annotated[int, pydantic.Field(ge=0, lt=2**63)]


def build_index(
    out: Path,
    tokenizer: Tokenizer,
    options: dict[str, Any],
    names: dict[str, str],
    inputs: list[dict[str, Any]],
    shards: dict[str, dict[str, list[ShardRecord]]],
) -> dict[str, Any]:
    """Write the block and crc tables of every source and return the index that names them; holds no floats.

    names: {slug: name in the corpus}; shards: records by split and source.
    """
    max_id = max(record.max_id for split in shards.values() for records in split.values() for record in records)
    check_vocabulary(np.array([max_id]), tokenizer.vocab_size, str(out))
    return {
        "format": FORMAT,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "vocab_size": tokenizer.vocab_size,
        "max_id": max_id,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "tokenizer": {
            "file": None if tokenizer.model_bytes() is None else TOKENIZER_FILE,
            "name": None if tokenizer.model_bytes() is not None else tokenizer.name,
            "sha256": tokenizer.sha256,
            "content_id": tokenizer.content_id,
            "pretok": PRETOK,
            "sentencepiece": trainer_version(),
        },
        "preprocess": {"options": options, "sha256": sha256_of_json(options)},
        "inputs": inputs,
        "splits": {
            split: {
                source: {"name": names[source], **_source_entry(out, split, source, records)}
                for source, records in sources.items()
            }
            for split, sources in shards.items()
        },
    }


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a dataset folder. Raises BadInput if there is none, DamagedData if it cannot be understood."""
    path = folder / INDEX_FILE
    if not path.is_file():
        hint = f"megaboat data prepare --input 'GLOB.jsonl.zst' --tokenizer FILE --out {folder}"
        raise BadInput(f"no dataset in {folder} ({INDEX_FILE} is missing); make one with: {hint}")
    index = read_json(path)
    found = index.get("format") if isinstance(index, dict) else None
    if found != FORMAT:
        raise BadInput(f"{path}: format {found!r}; this version reads {FORMAT!r}")
    try:
        known = _Index.model_validate(index)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedData(f"{path}: not the index of a dataset: {where}: {first['msg']}") from None
    for name in known.file_names():
        check_inside(name, path)
    return index


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)


class _Shard(_Part):
    file: str
    size: Count
    sha256: str


class _Source(_Part):
    name: str
    n_tokens: Count
    n_docs: Count
    n_text_bytes: Count
    shards: list[_Shard]
    blocks_file: str
    blocks_sha256: str
    crc_file: str
    crc_sha256: str


class _Tokenizer(_Part):
    name: str | None
    file: str | None
    sha256: str | None
    content_id: str


class _Preprocess(_Part):
    options: dict[str, Any]
    sha256: str


class _Index(_Part):
    """What is read of an index, so that no other file meets a missing entry or one of another kind."""

    vocab_size: Count
    dtype: Literal["|u1", "<u2", "<u4"]
    eos_id: int | None
    tokenizer: _Tokenizer
    preprocess: _Preprocess
    splits: dict[str, dict[str, _Source]]

    def file_names(self) -> list[str]:
        names = [self.tokenizer.file] if self.tokenizer.file is not None else []
        for sources in self.splits.values():
            for source in sources.values():
                names += [source.blocks_file, source.crc_file, *(shard.file for shard in source.shards)]
        return names


def dataset_id(folder: Path) -> str:
    """sha256 of index.json: through the hashes in it, of everything."""
    return hashlib.sha256((folder / INDEX_FILE).read_bytes()).hexdigest()


def _source_entry(out: Path, split: str, source: str, records: list[ShardRecord]) -> dict[str, Any]:
    blocks = np.zeros(sum(len(record.offsets) for record in records), BLOCK_DTYPE)
    blocks["shard"] = np.repeat(np.arange(len(records)), [len(record.offsets) for record in records])
    for column, values in (("offset", "offsets"), ("n_tokens", "n_tokens"), ("n_docs", "n_docs")):
        blocks[column] = np.concatenate([getattr(record, values) for record in records])
    blocks_file, crc_file = f"blocks-{split}-{source}.npy", f"crc-{split}-{source}.npy"
    write_array(out / blocks_file, blocks)
    write_array(out / crc_file, np.concatenate([np.array(record.crcs, "<u4") for record in records]))
    return {
        "n_tokens": int(blocks["n_tokens"].sum(dtype=np.int64)),
        "n_docs": int(blocks["n_docs"].sum(dtype=np.int64)),
        "n_text_bytes": sum(record.n_text_bytes for record in records),
        "shards": [
            {"file": record.file, "size": record.size, "sha256": record.sha256, "n_blocks": len(record.offsets)}
            for record in records
        ],
        "blocks_file": blocks_file,
        "blocks_sha256": sha256_of_file(out / blocks_file),
        "crc_file": crc_file,
        "crc_sha256": sha256_of_file(out / crc_file),
    }
