"""A tokenizer trained once for all data tests."""

from pathlib import Path

import pytest

from megaboat.data.tokenizer import Tokenizer, open_tokenizer
from megaboat.data.train_tokenizer import train_tokenizer
from tests.corpus import real_texts, write_jsonl


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = write_jsonl(folder / "lib.jsonl", real_texts(40))
    train_tokenizer([corpus], 1000, folder / "bpe1k.model")
    return folder / "bpe1k.model"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return open_tokenizer(tokenizer_file)
