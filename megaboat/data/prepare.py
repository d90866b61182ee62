"""`megaboat data prepare`: a corpus of jsonl files to a folder of token shards with an index.

    inputs --spill--> tokens and document tables --arrange--> shards --> index.json, written last

Without `index.json` there is no dataset. Work in progress lies in `<out>/.prepare`; the same command goes on where a
killed run stopped. The result does not depend on the number of workers, on interruptions or on file times.
"""

import fcntl
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megaboat.data.arrange import ShardJob, Spilled, find_kept, plan_shards, source_names, write_job
from megaboat.data.documents import slug
from megaboat.data.files import canonical_json, sha256_of_file, sha256_of_json, sync_folder, write_json, write_whole
from megaboat.data.index import INDEX_FILE, TOKENIZER_FILE, build_index, read_index
from megaboat.data.pool import run_jobs
from megaboat.data.shards import ShardRecord, token_dtype
from megaboat.data.spill import EARLY_BAD, SPLITS, PrepareOptions, SpillJob, describe_bad, spill
from megaboat.data.tokenizer import Tokenizer, open_tokenizer
from megaboat.errors import BadInput, MegaboatError
from megaboat.log import get_logger

WORK_FOLDER = ".prepare"
QUARANTINE_FILE = "quarantine.jsonl"
# Options that do not change how a file is tokenised: work done under other values of them is still good.
_LATE_OPTIONS = {"dedup", "max_bad_per_million", "allow_empty_files", "block_tokens", "blocks_per_shard"}


@dataclass(frozen=True)
class Request:
    """What to prepare. `inputs` maps a split to its files; those of "train" are split further by hash."""

    inputs: dict[str, list[Path]]
    tokenizer: str
    out: Path
    options: PrepareOptions = PrepareOptions()

    def files(self) -> list[tuple[str, str, Path]]:
        """(split, name, path) of every input, sorted; names are relative to the folder that holds all inputs."""
        paths = [path for split in SPLITS for path in self.inputs.get(split, [])]
        root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
        return [
            (split, path.absolute().relative_to(root).as_posix(), path)
            for split in SPLITS
            for path in sorted(self.inputs.get(split, []))
        ]


def prepare(request: Request, workers: int = 1, progress: bool = False) -> dict[str, Any]:
    """Write the dataset and return its index. An identical finished dataset is left as it is.

    Raises BadInput: damaged or unusable inputs (all of them named), too many bad lines, an `out` that holds
    something else, a full disk.
    """
    tokenizer = open_tokenizer(request.tokenizer)
    try:
        existing = _existing(request, tokenizer)
        if existing is not None:
            shutil.rmtree(request.out / WORK_FOLDER, ignore_errors=True)
            get_logger().info("%s is already prepared from these inputs", request.out)
            return existing
        with _locked(request.out / WORK_FOLDER):
            return _prepare(request, tokenizer, workers, progress)
    except OSError as error:
        raise BadInput(f"{error.filename or request.out}: {error.strerror or error}") from None


def _prepare(request: Request, tokenizer: Tokenizer, workers: int, progress: bool) -> dict[str, Any]:
    options = request.options
    key = {"options": options.model_dump(exclude=_LATE_OPTIONS), "tokenizer": tokenizer.sha256}
    work = request.out / WORK_FOLDER / sha256_of_json(key)[:16]
    records = _spill_all(request, work, workers, progress)
    _check_quarantine(request, records)
    files = [
        Spilled(_work_of(work, split, name), split != "train", [slug(source) for source in record["sources"]])
        for (split, name, _), record in zip(request.files(), records, strict=True)
    ]
    names = source_names(records)
    kept = find_kept(files, options.dedup == "exact")
    if not sum(int(keep.sum()) for keep in kept):
        raise BadInput(f"no document in {len(files)} input file(s)")
    template = {
        "out": request.out,
        "done": work / "shards",
        "tokenizer_id": tokenizer.content_id,
        "dtype": token_dtype(tokenizer.vocab_size).str,
    }
    jobs = (
        job
        for split in SPLITS
        for source in names
        for job in plan_shards(files, kept, split, source, options.block_tokens, options.blocks_per_shard, template)
    )
    shards = _write_all(jobs, kept, workers, progress)
    dropped = [int((~keep).sum()) for keep in kept]
    inputs = [
        _input_entry(split, name, record, duplicates)
        for (split, name, _), record, duplicates in zip(request.files(), records, dropped, strict=True)
    ]
    return _commit(request, tokenizer, names, inputs, shards)


def _spill_all(request: Request, work: Path, workers: int, progress: bool) -> list[dict[str, Any]]:
    """Tokenise every file; one record a file, in the order of the files. All failures are reported together."""
    files = request.files()
    jobs = [
        SpillJob(path, split, _work_of(work, split, name), request.tokenizer, request.options)
        for split, name, path in files
    ]
    total = sum(path.stat().st_size for _, _, path in files)
    records: dict[Path, dict[str, Any]] = {}
    failures: dict[Path, MegaboatError] = {}
    with tqdm(total=total, desc="tokenise", unit="B", unit_scale=True, disable=not progress) as bar:
        for job, result in run_jobs(spill, jobs, min(workers, len(jobs)), bar):
            if isinstance(result, MegaboatError):
                failures[job.work] = result
            else:
                records[job.work] = result
    if failures:
        lines = [str(failures[job.work]) for job in jobs if job.work in failures]
        more = f"\n({len(lines)} of {len(jobs)} files failed)" if len(lines) > 1 else ""
        raise BadInput("\n".join(lines) + more)
    return [records[job.work] for job in jobs]


def _check_quarantine(request: Request, records: list[dict[str, Any]]) -> None:
    """Write quarantine.jsonl if a line was set aside; raise BadInput if there were too many."""
    entries = [
        {"file": name, **entry}
        for (_, name, _), record in zip(request.files(), records, strict=True)
        for entry in record["quarantine"]
    ]
    path = request.out / QUARANTINE_FILE
    if not entries:
        path.unlink(missing_ok=True)
        return
    lines = "".join(" ".join(canonical_json(entry).split()) + "\n" for entry in entries)
    write_whole(path, lambda file: file.write(lines.encode()))
    reasons = describe_bad(Counter(entry["reason"] for entry in entries))
    documents = sum(record["documents"] for record in records)
    allowed = max(EARLY_BAD, (documents + len(entries)) * request.options.max_bad_per_million // 1_000_000)
    if len(entries) > allowed:
        raise BadInput(f"{reasons}: {len(entries):,} bad lines, {allowed:,} allowed; each is named in {path}")
    get_logger().warning("%d lines set aside, named in %s: %s", len(entries), path, reasons)


def _write_all(
    jobs: Iterator[ShardJob], kept: list[np.ndarray], workers: int, progress: bool
) -> dict[str, dict[str, list[ShardRecord]]]:
    """Write every shard; records by split and source, in the order of the shards."""
    records: dict[str, ShardRecord] = {}
    total = sum(int(keep.sum()) for keep in kept)
    with tqdm(total=total, desc="write shards", unit=" documents", disable=not progress) as bar:
        for _, result in run_jobs(write_job, jobs, workers, bar):
            if isinstance(result, MegaboatError):
                raise result
            records[result.file] = result
    shards: dict[str, dict[str, list[ShardRecord]]] = {}
    for file in sorted(records):
        split, name = file.split("/")
        shards.setdefault(split, {}).setdefault(name.rpartition("-")[0], []).append(records[file])
    return shards


def _commit(
    request: Request,
    tokenizer: Tokenizer,
    names: dict[str, str],
    inputs: list[dict[str, Any]],
    shards: dict[str, dict[str, list[ShardRecord]]],
) -> dict[str, Any]:
    """Put the small files beside the shards, drop what an interrupted plan left over, write index.json."""
    out = request.out
    model = tokenizer.model_bytes()
    if model is not None:
        write_whole(out / TOKENIZER_FILE, lambda file: file.write(model))
    index = build_index(out, tokenizer, request.options.model_dump(), names, inputs, shards)
    _clear_leftovers(out, index)
    for split in index["splits"]:
        sync_folder(out / split)
    write_json(out / INDEX_FILE, index)
    shutil.rmtree(out / WORK_FOLDER)
    return index


def _clear_leftovers(out: Path, index: dict[str, Any]) -> None:
    """Drop what killed runs and other plans left among the files that the index names."""
    entries = [entry for sources in index["splits"].values() for entry in sources.values()]
    wanted = {shard["file"] for entry in entries for shard in entry["shards"]}
    wanted |= {entry[key] for entry in entries for key in ("blocks_file", "crc_file")}
    patterns = ("*.tmp*", "blocks-*.npy", "crc-*.npy", *(f"{split}/*.tar*" for split in SPLITS))
    for path in [path for pattern in patterns for path in out.glob(pattern)]:
        if path.relative_to(out).as_posix() not in wanted:
            path.unlink(missing_ok=True)


def _input_entry(split: str, name: str, record: dict[str, Any], duplicates: int) -> dict[str, Any]:
    entry = {key: record[key] for key in ("sha256", "documents", "empty", "altered", "bad", "salvaged")}
    return {**entry, "path": name, "split": split, "size": record["identity"]["size"], "duplicates": duplicates}


def _work_of(work: Path, split: str, name: str) -> Path:
    return work / "files" / hashlib.sha256(f"{split}/{name}".encode()).hexdigest()[:16]


def _existing(request: Request, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The index of a finished dataset made from exactly this. Raises BadInput if `out` holds something else."""
    out = request.out
    if not out.exists() or not any(out.iterdir()):
        return None
    if not (out / INDEX_FILE).exists():
        if (out / WORK_FOLDER).is_dir():
            return None
        raise BadInput(f"{out} is not empty and not a dataset; choose another --out")
    index = read_index(out)
    same = (
        index["tokenizer"]["sha256"] == tokenizer.sha256
        and index["preprocess"]["options"] == request.options.model_dump()
        and [(entry["split"], entry["path"]) for entry in index["inputs"]]
        == [(split, name) for split, name, _ in request.files()]
        and [entry["sha256"] for entry in index["inputs"]] == [sha256_of_file(path) for _, _, path in request.files()]
    )
    if not same:
        raise BadInput(f"{out} holds a dataset of other inputs or options; choose another --out")
    return index


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"another `megaboat data prepare` is writing to {folder.parent}") from None
        yield
