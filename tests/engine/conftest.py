"""A small dataset of real text and the configuration of a run on it."""

from pathlib import Path
from typing import Any

import pytest

from megaboat.config import build_config
from megaboat.data.prepare import Request, prepare
from megaboat.data.train_tokenizer import train_tokenizer
from megaboat.engine.run_config import RunConfig
from tests.corpus import real_texts, write_jsonl


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Standard library modules in two sources, with held-out and test documents, under a vocabulary of 512."""
    folder = tmp_path_factory.mktemp("dataset")
    texts = real_texts(60, max_chars=6000)
    train = write_jsonl(folder / "train.jsonl", texts[:50])
    # Every run ends with an evaluation of all of it, so there is little.
    held_out = write_jsonl(folder / "val.jsonl", [text[:600] for text in texts[50:54]])
    tests = write_jsonl(folder / "test.jsonl", [text[:600] for text in texts[54:56]])
    train_tokenizer([train], 512, folder / "bpe.model")
    prepare(
        Request({"train": [train], "val": [held_out], "test": [tests]}, str(folder / "bpe.model"), folder / "tokens")
    )
    return folder / "tokens"


def tiny_tree(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """The sections of a run that takes seconds; `changes` are `section__key=value`."""
    tree: dict[str, Any] = {
        "model": {"layers": 2, "width": 32, "qk_dim": 16, "window": 8, "heads": 2},
        "data": {"path": str(data), "seq_len": 32},
        "train": {
            "out": str(out),
            "steps": 20,
            "global_batch": 4,
            "micro_batch": 2,
            "precision": "fp32",
            "eval_every": 0,
            "eval_tokens": 512,
            "save_every": 5,
            "tensorboard": False,
        },
        "optim": {"lr": 1e-2},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    return tree


def tiny_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    return build_config(RunConfig, tiny_tree(data, out, **changes), "the test")
