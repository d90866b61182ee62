"""Files that are there whole or not at all, and what is the same in every index: canonical JSON and hashes."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


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
