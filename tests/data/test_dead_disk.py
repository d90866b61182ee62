"""A data disk that dies under a run: an error that names the shard, not a signal that ends the process."""

import os
from pathlib import Path

import numpy as np
import pytest

from megaboat.data.dataset import open_dataset
from megaboat.data.prepare import Request, prepare
from megaboat.errors import DamagedData
from tests.corpus import real_texts, write_jsonl


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Bytes of real text in one shard, over 64 Ki tokens a source."""
    texts = write_jsonl(tmp_path / "texts.jsonl", real_texts(30), sources=("Lib",))
    prepare(Request({"train": [texts]}, "bytes+eos", tmp_path / "tokens"))
    return tmp_path / "tokens"


def test_a_shard_that_is_cut_while_it_is_read(tokens: Path) -> None:
    """What a dead disk does to a mapped file: the kernel cannot give the page. Untouched, this test is a SIGBUS."""
    source = open_dataset(tokens).source("train", "lib")
    assert len(source.read(0, 100)) == 100
    (shard,) = tokens.rglob("train/*.tar")
    os.truncate(shard, 150_000)
    with pytest.raises(DamagedData, match=rf"{shard.name}.*: block 0: byte offset [\d,]+ cannot be read"):
        source.read(source.n_tokens - 100, 100)
    assert np.array_equal(source.read(0, 100), open_again(tokens, shard)), "what was read before is still right"


def open_again(tokens: Path, shard: Path) -> np.ndarray:
    """The first hundred tokens by numpy alone, from the bytes that are left."""
    first = shard.read_bytes()[512 + 128 :]
    return np.frombuffer(first[:200], "<u2")


def test_a_shard_that_vanished(tokens: Path) -> None:
    source = open_dataset(tokens).source("train", "lib")
    (shard,) = tokens.rglob("train/*.tar")
    shard.unlink()
    with pytest.raises(DamagedData, match="cannot be mapped .*No such file"):
        source.read(0, 100)
