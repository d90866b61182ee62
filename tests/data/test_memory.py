"""The loader over a simulated index of 300 B tokens: how much memory of its own does it take?"""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from megaboat.data.files import sha256_of_file, write_array, write_json
from megaboat.data.shards import BLOCK_DTYPE, CHUNK_TOKENS, FORMAT, doclens_offset

BLOCK_TOKENS = 1 << 20
BLOCKS_PER_SHARD = 128
SHARDS = 2_236
STRIDE = (BLOCK_TOKENS * 2 + (1 << 14)) // 512 * 512
LIMIT_MB = 200

MEASURE = """
import sys
from pathlib import Path
from megaboat.data.config import DataConfig
from megaboat.data.dataset import open_dataset
from megaboat.data.loader import Loader

def own_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) // 1024

before = own_memory()
loader = Loader(DataConfig(seq_len=2048), open_dataset(sys.argv[1]), global_batch=512, consumed_windows=10**7)
for _ in range(12):
    next(loader)
print(own_memory() - before)
"""


def write_dataset(folder: Path) -> int:
    """A dataset of zeros whose shards are links to one sparse file; returns how many tokens its index claims."""
    offsets = 640 + np.arange(BLOCKS_PER_SHARD, dtype=np.int64) * STRIDE
    size = int(offsets[-1]) + STRIDE
    (folder / "train").mkdir(parents=True)
    first = folder / "train" / "zeros-00000.tar"
    with first.open("wb") as file:
        file.truncate(size)
        for offset in offsets.tolist():
            file.seek(doclens_offset(offset, BLOCK_TOKENS, 2))
            file.write(np.array([BLOCK_TOKENS], "<u4").tobytes())
    names = [f"train/zeros-{number:05d}.tar" for number in range(SHARDS)]
    for name in names[1:]:
        os.link(first, folder / name)
    blocks = np.zeros(SHARDS * BLOCKS_PER_SHARD, BLOCK_DTYPE)
    blocks["shard"] = np.repeat(np.arange(SHARDS), BLOCKS_PER_SHARD)
    blocks["offset"] = np.tile(offsets, SHARDS)
    blocks["n_tokens"], blocks["n_docs"] = BLOCK_TOKENS, 1
    crc = zlib.crc32(bytes(2 * CHUNK_TOKENS))
    write_array(folder / "blocks.npy", blocks)
    write_array(folder / "crc.npy", np.full(len(blocks) * BLOCK_TOKENS // CHUNK_TOKENS, crc, "<u4"))
    entry = {
        "name": "zeros",
        "n_tokens": len(blocks) * BLOCK_TOKENS,
        "n_docs": len(blocks),
        "n_text_bytes": 1,
        "shards": [{"file": name, "size": size, "sha256": "", "n_blocks": BLOCKS_PER_SHARD} for name in names],
        "blocks_file": "blocks.npy",
        "blocks_sha256": sha256_of_file(folder / "blocks.npy"),
        "crc_file": "crc.npy",
        "crc_sha256": sha256_of_file(folder / "crc.npy"),
    }
    index = {
        "format": FORMAT,
        "dtype": "<u2",
        "vocab_size": 32_000,
        "eos_id": 2,
        "tokenizer": {"file": None, "name": "bytes", "sha256": "", "content_id": ""},
        "preprocess": {"options": {}, "sha256": ""},
        "splits": {"train": {"zeros": entry}},
    }
    write_json(folder / "index.json", index)
    return len(blocks) * BLOCK_TOKENS


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from /proc")
def test_a_loader_over_300_billion_tokens_stays_small(tmp_path: Path) -> None:
    assert write_dataset(tmp_path / "huge") > 300e9
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "huge")], check=True, capture_output=True, text=True
    )
    # Five batches of 512 x 2,048 are 25 MB each: four read ahead, one in hand.
    assert 0 < int(result.stdout) < LIMIT_MB
