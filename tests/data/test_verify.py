import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megaboat.data.dataset import open_dataset
from megaboat.data.files import write_json
from megaboat.data.prepare import Request, prepare
from megaboat.data.shards import NPY_HEADER, TAR_RECORD, doclens_offset
from megaboat.data.spill import PrepareOptions
from megaboat.data.stats import BINS, dataset_stats, stats_table
from megaboat.data.verify import verify_dataset
from megaboat.errors import BadInput
from tests.corpus import real_texts, write_jsonl

SHARD = "train/lib-00001.tar"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    corpus = write_jsonl(folder / "lib.jsonl", real_texts(60, 3000))
    options = PrepareOptions(block_tokens=5000, blocks_per_shard=2, val_per_10k=0)
    prepare(Request({"train": [corpus]}, str(tokenizer_file), folder / "out", options))
    return folder / "out"


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def first_block(folder: Path) -> tuple[int, int]:
    """Offset and tokens of the first block of SHARD."""
    blocks = np.load(folder / "blocks-train-lib.npy")
    row = blocks[blocks["shard"] == 1][0]
    return int(row["offset"]), int(row["n_tokens"])


def test_a_sound_dataset_has_no_faults(sound: Path) -> None:
    assert verify_dataset(sound) == verify_dataset(sound, workers=2) == []


def test_any_flipped_byte_is_found_wherever_it_lies(copy: Path) -> None:
    size = (copy / SHARD).stat().st_size
    for offset in range(3, size, size // 40):
        flip(copy / SHARD, offset)
        assert verify_dataset(copy), f"byte {offset} of {size}"
        flip(copy / SHARD, offset)
    assert verify_dataset(copy) == []


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("tokens", "crc 0 differs"),
        ("doclens", "block 0: document lengths do not sum to its tokens"),
        ("tar header", "block 0 cannot be read"),
        ("npy header", "block 0"),
        ("padding", "sha256 differs, though tokens and counts are right"),
    ],
)
def test_faults_in_shards_are_told_apart(copy: Path, where: str, message: str) -> None:
    offset, n_tokens = first_block(copy)
    doclens = doclens_offset(offset, n_tokens, 2)
    places = {
        "tokens": offset + 20,
        "doclens": doclens,
        "tar header": offset - NPY_HEADER - TAR_RECORD + 3,
        "npy header": offset - NPY_HEADER + 1,
        "padding": doclens - NPY_HEADER - TAR_RECORD - 1,
    }
    flip(copy / SHARD, places[where])
    (fault,) = verify_dataset(copy)
    assert fault.startswith(f"{copy / SHARD}: ")
    assert message in fault


def test_missing_short_and_swapped_files_are_all_named(copy: Path) -> None:
    (copy / "train/lib-00000.tar").unlink()
    with (copy / SHARD).open("ab") as file:
        file.write(bytes(512))
    shutil.copy(copy / "train/other-x-00000.tar", copy / "train/other-x-00001.tar")
    faults = verify_dataset(copy)
    assert len(faults) == 3
    assert "lib-00000.tar: is missing" in faults[0]
    assert "lib-00001.tar" in faults[1]
    assert "bytes; index.json says" in faults[1]
    assert "other-x-00001.tar" in faults[2]


@pytest.mark.parametrize("name", ["tokenizer.model", "blocks-train-lib.npy", "crc-train-lib.npy"])
def test_damaged_small_files_are_named(copy: Path, name: str) -> None:
    flip(copy / name, -2)
    assert verify_dataset(copy) == [f"{copy / name}: sha256 differs from index.json"]
    (copy / name).unlink()
    assert verify_dataset(copy) == [f"{copy / name}: is missing"]


def test_an_index_that_claims_other_things_is_found_out(copy: Path) -> None:
    index = json.loads((copy / "index.json").read_text())
    index["vocab_size"] = 300
    index["preprocess"]["options"]["dedup"] = "off"
    write_json(copy / "index.json", index)
    assert verify_dataset(copy) == [f"{copy / 'index.json'}: the hash of the options is not theirs"]
    index["preprocess"]["options"]["dedup"] = "exact"
    write_json(copy / "index.json", index)
    assert all("is outside the vocabulary of 300" in fault for fault in verify_dataset(copy))
    with pytest.raises(BadInput, match="no dataset"):
        verify_dataset(copy / "absent")


def test_stats_are_those_of_the_documents(sound: Path) -> None:
    dataset = open_dataset(sound)
    stats = dataset_stats(dataset)
    assert {entry.name for entry in stats} == {"Lib", "Other (x)"}
    for entry in stats:
        texts = real_texts(60, 3000)[0 if entry.name == "Lib" else 1 :: 2]
        lengths = sorted(len(dataset.tokenizer.encode(text)) + 1 for text in texts)
        assert (entry.documents, entry.tokens, entry.longest) == (len(texts), sum(lengths), lengths[-1])
        assert entry.text_bytes == sum(len(text.encode()) for text in texts)
        assert entry.median in lengths
        histogram = [0] * BINS
        for length in lengths:
            histogram[length.bit_length() - 1] += 1
        assert entry.histogram == tuple(histogram)
    table = stats_table(stats).splitlines()
    assert len(table) == 4
    assert f"{sum(entry.tokens for entry in stats):,}" in table[-1]
