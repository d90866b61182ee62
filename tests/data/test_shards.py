import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megaboat.data.dataset import open_dataset
from megaboat.data.prepare import Request, prepare
from megaboat.data.shards import check_vocabulary, token_dtype
from megaboat.data.spill import PrepareOptions
from megaboat.errors import BadInput

TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(str.strip),
    min_size=1,
    max_size=25,
    unique=True,
)


@settings(max_examples=25)
@given(texts=TEXTS, block_tokens=st.integers(1, 200), blocks_per_shard=st.integers(1, 4))
def test_texts_come_back_through_any_shards(texts: list[str], block_tokens: int, blocks_per_shard: int) -> None:
    """Through preparation and the loader's view, and the same through stock webdataset."""
    options = PrepareOptions(
        block_tokens=block_tokens, blocks_per_shard=blocks_per_shard, val_per_10k=0, default_source="any"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "in.jsonl").write_text(lines)
        index = prepare(Request({"train": [folder / "in.jsonl"]}, "bytes+eos", folder / "out", options))
        dataset = open_dataset(folder / "out", verify="full")
        source = dataset.source("train", "any")
        stream = source.read(0, source.n_tokens)
        documents = np.split(stream, np.cumsum(source.document_lengths())[:-1])
        assert sorted(dataset.tokenizer.decode(document) for document in documents) == sorted(texts)
        starts = source.read_windows(np.array([0]), np.empty((1, source.n_tokens), dataset.dtype))[0]
        assert starts.tolist() == [0, *np.cumsum(source.document_lengths())[:-1]]
        urls = [str(folder / "out" / shard["file"]) for shard in index["splits"]["train"]["any"]["shards"]]
        blocks = [sample["tokens.npy"] for sample in webdataset.WebDataset(urls, shardshuffle=False).decode()]
        assert np.array_equal(np.concatenate(blocks), stream)
        whole_documents = [len(block) for block in blocks if len(block) > block_tokens]
        assert all(length in source.document_lengths() for length in whole_documents)


def test_token_types_are_as_narrow_as_the_vocabulary_allows() -> None:
    sizes = {256: "|u1", 257: "<u2", 65_536: "<u2", 65_537: "<u4"}
    assert {size: token_dtype(size).str for size in sizes} == sizes


def test_ids_outside_the_vocabulary_are_refused() -> None:
    check_vocabulary(np.array([0, 255]), 256, "x")
    with pytest.raises(BadInput, match="corpus.jsonl:7: token id 256 is outside the vocabulary of 256"):
        check_vocabulary(np.array([3, 256]), 256, "corpus.jsonl:7")
