"""The recipe of enwik8: every byte in its split, whatever the bytes are; another file is refused unless asked for."""

import subprocess
import sys
from pathlib import Path

from megaboat.data.dataset import open_dataset

RECIPE = Path(__file__).resolve().parents[2] / "data" / "enwik8.py"


def run(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, str(RECIPE), *map(str, words)], capture_output=True, text=True, check=False)


def test_every_byte_is_in_its_split(tmp_path: Path) -> None:
    """Both borders lie inside a character."""
    data = "<page> æøå\n".encode() * 99 + "語".encode() * 111
    data = data[: len(data) // 100 * 100]
    ends = [len(data) * share // 100 for share in (0, 90, 95, 100)]
    (tmp_path / "wiki").write_bytes(data)
    refused = run(tmp_path / "wiki", "--out", tmp_path / "out")
    assert refused.returncode == 2
    assert "where enwik8 has 100,000,000 with a1fa5ffddb56f4953e226637dabbb36a" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = run(tmp_path / "wiki", "--out", tmp_path / "out", "--any")
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(tmp_path / "out" / "tokens")
    assert dataset.vocab_size == 256
    for split, start, end in zip(("train", "val", "test"), ends, ends[1:], strict=False):
        (name,) = dataset.splits[split]
        source = dataset.source(split, name)
        assert bytes(source.read(0, source.n_tokens).astype("uint8")) == data[start:end]
        assert source.n_text_bytes == end - start, "so that bits per byte are those of the literature's characters"


def test_a_missing_file_is_said_in_one_line(tmp_path: Path) -> None:
    done = run(tmp_path / "none", "--out", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No such file" in done.stderr
