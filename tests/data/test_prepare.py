import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset

from megaboat.data.dataset import open_dataset
from megaboat.data.index import dataset_id
from megaboat.data.prepare import Request, prepare
from megaboat.data.shards import CHUNK_TOKENS, Block, doclens_offset, write_shard
from megaboat.data.spill import PrepareOptions
from megaboat.data.tokenizer import Tokenizer
from megaboat.errors import BadInput
from tests.corpus import real_texts, write_jsonl

SMALL_BLOCKS = {"block_tokens": 5_000, "blocks_per_shard": 3, "val_per_10k": 500}


def make_corpus(folder: Path) -> list[Path]:
    texts = real_texts(60, max_chars=4000)
    texts[50:55] = texts[:5]  # exact copies, in other files than their originals
    return [write_jsonl(folder / f"{i}.jsonl", texts[i::3]) for i in range(3)]


def request_of(folder: Path, inputs: list[Path], tokenizer: Path | str, **options: object) -> Request:
    return Request({"train": inputs}, str(tokenizer), folder, PrepareOptions(**{**SMALL_BLOCKS, **options}))


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, tokenizer_file: Path) -> None:
    inputs = make_corpus(tmp_path / "in")
    for workers in (1, 2):
        prepare(request_of(tmp_path / str(workers), inputs, tokenizer_file), workers)
    files = [sorted(p.relative_to(tmp_path / w) for p in (tmp_path / w).rglob("*")) for w in ("1", "2")]
    assert files[0] == files[1]
    assert dataset_id(tmp_path / "1") == dataset_id(tmp_path / "2")
    for file in files[0]:
        if (tmp_path / "1" / file).is_file():
            assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_stock_webdataset_reads_every_document_once(tmp_path: Path, tokenizer_file: Path, tokenizer: Tokenizer) -> None:
    index = prepare(request_of(tmp_path / "out", make_corpus(tmp_path / "in"), tokenizer_file))
    found: list[str] = []
    for sources in index["splits"].values():
        for source, entry in sources.items():
            urls = [str(tmp_path / "out" / shard["file"]) for shard in entry["shards"]]
            samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
            assert len(samples) == sum(shard["n_blocks"] for shard in entry["shards"])
            for sample in samples:
                tokens, doclens, meta = sample["tokens.npy"], sample["doclens.npy"], sample["meta.json"]
                assert (meta["source"], meta["n_tokens"], meta["n_docs"]) == (source, len(tokens), len(doclens))
                assert meta["tokenizer"] == tokenizer.content_id
                pieces = np.split(tokens, np.cumsum(doclens)[:-1])
                assert all(piece[-1] == tokenizer.eos_id for piece in pieces)
                texts = [tokenizer.decode(piece) for piece in pieces]
                assert meta["n_text_bytes"] == sum(len(text.encode()) for text in texts)
                found += texts
    assert sorted(found) == sorted(set(real_texts(60, max_chars=4000)[:50] + real_texts(60, max_chars=4000)[55:]))
    assert sum(entry["duplicates"] for entry in index["inputs"]) == 5


def test_tar_payloads_are_where_the_index_says(tmp_path: Path) -> None:
    blocks = [Block(np.arange(n, dtype="<u2"), np.array([n - 3, 3], "<u4"), n, 0) for n in (10, CHUNK_TOKENS - 5, 999)]
    record = write_shard(tmp_path, "train/x-00000.tar", blocks, "x", "id")
    data = (tmp_path / record.file).read_bytes()
    assert len(data) == record.size
    for block, offset in zip(blocks, record.offsets, strict=True):
        n = len(block.tokens)
        assert offset % 64 == 0
        assert np.array_equal(np.frombuffer(data, "<u2", n, offset), block.tokens)
        assert np.array_equal(np.frombuffer(data, "<u4", 2, doclens_offset(offset, n, 2)), block.doclens)


def test_given_validation_files_stay_whole_and_their_copies_leave_training(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    texts = real_texts(20, max_chars=2000)
    train = write_jsonl(tmp_path / "train.jsonl", texts)
    val = write_jsonl(tmp_path / "val.jsonl", [*texts[:4], texts[0]], sources=("Held",))
    request = Request(
        {"train": [train], "val": [val]}, str(tokenizer_file), tmp_path / "out", PrepareOptions(val_per_10k=0)
    )
    splits = prepare(request)["splits"]
    assert sum(entry["n_docs"] for entry in splits["train"].values()) == 16
    assert splits["val"]["held"]["n_docs"] == 5


def test_validation_depends_on_the_text_alone(tmp_path: Path) -> None:
    inputs = make_corpus(tmp_path / "in")
    prepare(request_of(tmp_path / "a", inputs, "bytes", dedup="off"))
    (tmp_path / "renamed").mkdir()
    moved = [shutil.copy(path, tmp_path / "renamed" / f"{9 - i}.jsonl") for i, path in enumerate(inputs[:2])]
    prepare(request_of(tmp_path / "b", [Path(path) for path in moved], "bytes", dedup="off"))
    held = [_documents(tmp_path / name / "val") for name in "ab"]
    assert held[1]
    assert held[1] <= held[0]


def _documents(folder: Path) -> set[bytes]:
    """Documents of every shard in a folder of a byte corpus."""
    found: set[bytes] = set()
    for tar in folder.glob("*.tar"):
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False).decode():
            pieces = np.split(sample["tokens.npy"], np.cumsum(sample["doclens.npy"])[:-1])
            found |= {piece.tobytes() for piece in pieces}
    return found


def test_a_finished_dataset_is_kept_and_another_is_refused(tmp_path: Path) -> None:
    inputs = make_corpus(tmp_path / "in")
    out = tmp_path / "out"
    prepare(request_of(out, inputs, "bytes"))
    stamp = (out / "index.json").stat().st_mtime_ns
    prepare(request_of(out, inputs, "bytes"))
    assert (out / "index.json").stat().st_mtime_ns == stamp
    with pytest.raises(BadInput, match="other inputs or options"):
        prepare(request_of(out, inputs[:2], "bytes"))
    with pytest.raises(BadInput, match="other inputs or options"):
        prepare(request_of(out, inputs, "bytes+eos"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("do not touch")
    with pytest.raises(BadInput, match="not empty and not a dataset"):
        prepare(request_of(tmp_path / "home", inputs, "bytes"))
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]


def test_byte_corpora_have_one_byte_a_token_and_no_eos(tmp_path: Path) -> None:
    index = prepare(request_of(tmp_path / "out", make_corpus(tmp_path / "in"), "bytes"))
    assert (index["dtype"], index["vocab_size"], index["eos_id"]) == ("|u1", 256, None)
    for entry in index["splits"]["train"].values():
        assert entry["n_tokens"] == entry["n_text_bytes"]


def test_the_index_is_canonical_and_holds_no_floats(tmp_path: Path) -> None:
    prepare(request_of(tmp_path / "out", make_corpus(tmp_path / "in"), "bytes"))
    text = (tmp_path / "out" / "index.json").read_text()
    index = json.loads(text, parse_float=lambda value: pytest.fail(f"a float in the index: {value}"))
    assert text == json.dumps(index, sort_keys=True, indent=1) + "\n"
    assert str(tmp_path) not in text


def test_plain_texts_are_documents_byte_for_byte(tmp_path: Path, tokenizer_file: Path) -> None:
    """As for enwik8: parts of one file, cut at any byte, given as train, val and test."""
    data = "".join(real_texts(4)).encode() + "é".encode() * 50
    cuts = {"train": data[: len(data) - 99], "val": data[len(data) - 99 : -40], "test": data[-40:]}
    assert cuts["val"][:1] == b"\xa9", "the cut lies within a character"
    for split, part in cuts.items():
        (tmp_path / f"{split}.txt").write_bytes(part)
    inputs = {split: [tmp_path / f"{split}.txt"] for split in cuts}
    request = Request(inputs, "bytes", tmp_path / "out", PrepareOptions(default_source="enwik8"))
    prepare(request)
    dataset = open_dataset(tmp_path / "out")
    for split, part in cuts.items():
        source = dataset.source(split, "enwik8")
        assert source.read(0, source.n_tokens).tobytes() == part
        assert source.n_docs == 1
    with pytest.raises(BadInput, match="val.txt: invalid UTF-8 at byte 0"):
        prepare(Request(inputs, str(tokenizer_file), tmp_path / "bpe"))


def test_leftovers_of_a_killed_commit_and_of_another_plan_are_cleared(tmp_path: Path) -> None:
    inputs = make_corpus(tmp_path / "in")
    prepare(request_of(tmp_path / "clean", inputs, "bytes"))
    out = tmp_path / "out"
    (out / ".prepare").mkdir(parents=True)
    (out / "train").mkdir()
    for name in (
        "blocks-train-lib.npy.tmp17",
        "blocks-train-gone.npy",
        "train/lib-00099.tar",
        "train/lib-00000.tar.tmp17",
    ):
        (out / name).write_bytes(b"half of something")
    prepare(request_of(out, inputs, "bytes"))
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in (tmp_path / "clean", out)]
    assert names[0] == names[1]
    assert dataset_id(tmp_path / "clean") == dataset_id(out)
