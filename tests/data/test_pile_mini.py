"""The acceptance runs on the shared corpus: real domains, real lengths."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset

from megaboat.data.dataset import open_dataset
from megaboat.data.index import dataset_id
from megaboat.data.train_tokenizer import train_tokenizer
from tests.corpus import corpus_folder


@pytest.mark.slow
def test_pile_mini_comes_out_the_same_with_1_and_4_workers_and_after_kill_9(tmp_path: Path) -> None:
    corpus = corpus_folder() / "pile_mini"
    train_tokenizer(sorted((corpus / "train").glob("0[0-2]*.zst")), 8000, tmp_path / "bpe8k.model")
    command = [sys.executable, "-m", "megaboat", "data", "prepare", "--input", str(corpus / "train" / "*.jsonl.zst")]
    command += ["--val", str(corpus / "val.jsonl.zst"), "--tokenizer", str(tmp_path / "bpe8k.model")]
    for workers in ("1", "4"):
        subprocess.run([*command, "--workers", workers, "--out", str(tmp_path / workers)], check=True)
    killed = subprocess.Popen([*command, "--workers", "4", "--out", str(tmp_path / "killed")])
    while len(list((tmp_path / "killed").rglob("done.json"))) < 4:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "index.json").exists()
    subprocess.run([*command, "--workers", "2", "--out", str(tmp_path / "killed")], check=True)
    assert len({dataset_id(tmp_path / name) for name in ("1", "4", "killed")}) == 1
    dataset = open_dataset(tmp_path / "1", verify="full")
    assert {split: len(sources) for split, sources in dataset.splits.items()} == {"train": 8, "val": 8}
    for split, sources in dataset.index["splits"].items():
        for name, entry in sources.items():
            urls = [str(tmp_path / "1" / shard["file"]) for shard in entry["shards"]]
            samples = webdataset.WebDataset(urls, shardshuffle=False).decode()
            tokens = np.concatenate([sample["tokens.npy"] for sample in samples])
            assert np.array_equal(tokens, dataset.source(split, name).read(0, entry["n_tokens"]))


@pytest.mark.slow
def test_a_tokenizer_of_pile_mini_is_the_same_in_two_processes(tmp_path: Path) -> None:
    pattern = str(corpus_folder() / "pile_mini" / "train" / "*.jsonl.zst")
    for name in ("one", "two"):
        command = [sys.executable, "-m", "megaboat", "tokenizer", "train", "--input", pattern, "--vocab-size", "8000"]
        subprocess.run([*command, "--max-lines", "200000", "--out", str(tmp_path / f"{name}.model")], check=True)
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()
