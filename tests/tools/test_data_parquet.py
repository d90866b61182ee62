"""Parquet files as input of `megaboat data prepare`: the same documents as from jsonl, and what is bad in them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megaboat.cli import main
from megaboat.data.dataset import open_dataset
from megaboat.data.reader import read_lines
from megaboat.data.train_tokenizer import sample_lines
from tests.corpus import real_texts, write_jsonl

Run = Callable[..., tuple[int, str]]
DOCUMENTS, GROUP = 40, 10


def write_parquet(path: Path, texts: list[Any], **columns: list[Any]) -> Path:
    """Pile-style columns in row groups of GROUP rows, with page checksums."""
    meta = [{"pile_set_name": ("Lib", "Other (x)")[i % 2], "quality": float("nan")} for i in range(len(texts))]
    table = pyarrow.table({"text": texts, "meta": meta, **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=GROUP, write_page_checksum=True, compression="zstd")
    return path


@pytest.fixture
def prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(path: Path, *options: str, out: str = "out") -> tuple[int, str]:
        command = ["data", "prepare", "--input", str(path), "--tokenizer", "bytes", "--workers", "1"]
        code = main([*command, "--out", str(tmp_path / out), "--val-per-10k", "0", *options])
        streams = capsys.readouterr()
        assert "Traceback" not in streams.err
        return code, streams.out + streams.err

    return run


def documents(folder: Path) -> list[bytes]:
    dataset = open_dataset(folder)
    found = []
    for name in dataset.splits["train"]:
        source = dataset.source("train", name)
        ends = np.cumsum(source.document_lengths())[:-1]
        found += [name.encode() + part.tobytes() for part in np.split(source.read(0, source.n_tokens), ends)]
    return sorted(found)


def test_the_documents_are_those_of_the_same_jsonl(prepare: Run, tmp_path: Path) -> None:
    texts = [*real_texts(DOCUMENTS, 5000), "é \u2028 \x00 👩‍👩‍👧"]
    assert prepare(write_parquet(tmp_path / "a.parquet", texts, blob=[b"\xff"] * len(texts)))[0] == 0
    assert prepare(write_jsonl(tmp_path / "a.jsonl", texts), out="jsonl")[0] == 0
    assert documents(tmp_path / "out") == documents(tmp_path / "jsonl")
    samples = [sample_lines([tmp_path / name], 500) for name in ("a.parquet", "a.jsonl")]
    assert samples[0] == samples[1]


def test_rows_are_read_with_the_asked_columns_only_and_progress_is_told(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", real_texts(DOCUMENTS, 5000), blob=[b"\xff"] * DOCUMENTS)
    told: list[int] = []
    lines = list(read_lines(path, on_read=told.append, keys=("text", "meta.pile_set_name")))
    assert [line.number for line in lines] == list(range(1, DOCUMENTS + 1))
    assert sum(told) == path.stat().st_size
    assert len(told) > DOCUMENTS / GROUP
    assert set(json.loads(lines[3].data or b"")) == {"text", "meta"}
    assert [line.data for line in read_lines(path, max_line_bytes=10)] == [None] * DOCUMENTS


def test_flat_columns_are_named_by_options(prepare: Run, tmp_path: Path) -> None:
    table = pyarrow.table({"content": real_texts(3, 500), "origin": ["web", "web", "law"], "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    code, said = prepare(tmp_path / "a.parquet")
    assert code == 2
    assert "a.parquet: no column 'text'; it has content, origin, id: name one with --text-key" in said
    code, said = prepare(tmp_path / "a.parquet", "--text-key", "content")
    assert code == 2
    assert "no 'meta.pile_set_name'; --default-source NAME" in said
    assert prepare(tmp_path / "a.parquet", "--text-key", "content", "--source-key", "origin")[0] == 0
    assert set(open_dataset(tmp_path / "out").splits["train"]) == {"law", "web"}


def test_bad_rows_are_set_aside_by_their_number(prepare: Run, tmp_path: Path) -> None:
    texts = real_texts(DOCUMENTS, 500)
    strings = [text.encode() for text in texts]
    strings[4], strings[17] = b"caf\xe9", b"\xff\xfe"
    offsets = np.cumsum([0, *map(len, strings)]).astype(np.int32)
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"".join(strings))]
    write_parquet(tmp_path / "a.parquet", pyarrow.Array.from_buffers(pyarrow.string(), DOCUMENTS, buffers))
    code, said = prepare(tmp_path / "a.parquet")
    assert code == 0
    assert "2 lines set aside" in said
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in listed] == [(5, "invalid UTF-8"), (18, "invalid UTF-8")]
    write_parquet(tmp_path / "b.parquet", [*texts, None])
    code, said = prepare(tmp_path / "b.parquet", out="null")
    assert (code, "1 lines no 'text'" in said) == (0, True)


def damaged(path: Path, kind: str) -> Path:
    data = path.read_bytes()
    third = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(0)
    place = third.dictionary_page_offset + third.total_compressed_size // 2
    flipped = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
    changed = {"cut": data[:-3], "empty": b"", "another format": b'{"text": "a"}\n' * 9, "bit": flipped}
    path.write_bytes(changed[kind])
    return path


@pytest.mark.parametrize("kind", ["cut", "empty", "another format", "bit"])
def test_damaged_files_fail_and_commit_nothing(prepare: Run, tmp_path: Path, kind: str) -> None:
    path = damaged(write_parquet(tmp_path / "a.parquet", real_texts(DOCUMENTS, 5000)), kind)
    code, said = prepare(path)
    assert code == 2
    assert "a.parquet: damaged or not parquet (" in said
    assert f"nothing of its {2 * GROUP if kind == 'bit' else 0} readable documents is kept" in said
    assert not (tmp_path / "out" / "index.json").exists()


def test_salvage_keeps_the_row_groups_before_the_damage(prepare: Run, tmp_path: Path) -> None:
    path = damaged(write_parquet(tmp_path / "a.parquet", real_texts(DOCUMENTS, 5000)), "bit")
    assert prepare(path, "--salvage")[0] == 0
    assert len(documents(tmp_path / "out")) == 2 * GROUP


def test_without_pyarrow_it_says_how_to_get_it(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a"])
    (tmp_path / "absent" / "pyarrow").mkdir(parents=True)
    (tmp_path / "absent" / "pyarrow" / "__init__.py").write_text("raise ImportError('not here')\n")
    command = [sys.executable, "-m", "megaboat", "data", "prepare", "--input", str(path), "--tokenizer", "bytes"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "absent")}
    done = subprocess.run(
        [*command, "--workers", "1", "--out", str(tmp_path / "out")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        f"megaboat data: {path}: parquet files are read by pyarrow: pip install pyarrow"
    )
