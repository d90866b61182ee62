"""Files that are there whole or not at all, and what is the same in every index: canonical JSON and hashes."""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megaboat.errors import DamagedData


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, ASCII, a newline at the end."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"


def sha256_of_json(value: Any) -> str:
    """The hash of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """The hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, limit: int = 1 << 28) -> Any:
    """A JSON file of at most `limit` bytes. Raises DamagedData where it cannot be read."""
    try:
        if path.stat().st_size > limit:
            raise DamagedData(f"{path}: {path.stat().st_size:,} bytes; such a file has at most {limit:,}")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DamagedData(f"{path}: cannot be read: {error}") from None
    except ValueError as error:
        raise DamagedData(f"{path}: not JSON: {error}") from None
    except RecursionError:
        raise DamagedData(f"{path}: cannot be read: nested too deeply") from None


def read_table(path: Path) -> np.ndarray:
    """A .npy file of plain numbers. Raises DamagedData for anything else."""
    try:
        table: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DamagedData(f"{path}: cannot be read: {error}") from None
    return table


def check_inside(name: Any, named_by: Path) -> None:
    """Raises DamagedData unless `name`, found in the file `named_by`, stays in that file's folder."""
    inside = isinstance(name, str) and name and not Path(name).is_absolute() and ".." not in Path(name).parts
    if not inside or "\0" in name:
        raise DamagedData(f"{named_by}: it names the file {name!r}, which is not in its folder; nothing was read there")


def check_files(folder: Path, files: Any, named_by: Path) -> None:
    """Raises DamagedData unless each file of `{name: {"bytes": ..., "sha256": ...}}` is in the folder, as it says."""
    try:
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (KeyError, TypeError, AttributeError):
        raise DamagedData(f"{named_by}: damaged: it does not give size and sha256 of each file") from None
    for name in entries:
        check_inside(name, named_by)

    def is_whole(name: str) -> bool:
        path, (size, sha256) = folder / name, entries[name]
        return path.is_file() and path.stat().st_size == size and sha256_of_file(path) == sha256

    with ThreadPoolExecutor() as pool:  # a core hashes 1 to 2 GB/s, and a large checkpoint has hundreds
        for name, whole in zip(entries, pool.map(is_whole, entries), strict=True):
            if not whole:
                raise DamagedData(f"{folder / name}: not as written: size or sha256 differs from {named_by.name}")


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a temporary file, then put it on disk under its name in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON, whole or not at all."""
    write_whole(path, lambda file: file.write(canonical_json(value).encode()))


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file, whole or not at all."""
    write_whole(path, lambda file: np.save(file, array, allow_pickle=False))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
