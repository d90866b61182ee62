"""The recipe that deals held-out documents to two halves: nothing lost, nothing twice, every source in both."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from megaboat.data.documents import Document, parse_line
from megaboat.data.reader import read_lines
from tests.corpus import real_texts

RECIPE = Path(__file__).resolve().parents[2] / "data" / "halves.py"


def test_halves_hold_everything_once_and_every_source_alike(tmp_path: Path) -> None:
    texts = real_texts(40, max_chars=20_000)
    sources = ["Alone", *["Many"] * 29, *["Few"] * 10]
    lines = [
        json.dumps({"text": text, "meta": {"pile_set_name": source}})
        for text, source in zip(texts, sources, strict=True)
    ]
    plain = tmp_path / "val.jsonl"
    plain.write_text("\n".join(lines) + "\n")
    subprocess.run(["zstd", "-q", str(plain)], check=True)
    command = [sys.executable, str(RECIPE), str(plain) + ".zst", "--out", str(tmp_path / "halves")]
    subprocess.run(command, check=True)
    halves = []
    for name in ("val", "test"):
        found = defaultdict(list)
        for line in read_lines(tmp_path / "halves" / f"{name}.jsonl.zst"):
            document = parse_line(line, "text", "meta.pile_set_name")
            assert isinstance(document, Document)
            found[document.source].append(document.text)
        halves.append(found)
    first, second = halves
    assert first["Alone"][0] + second["Alone"][0] == texts[0]
    assert first["Alone"][0].endswith("\n")
    for source in ("Many", "Few"):
        whole = [text for text, its in zip(texts, sources, strict=True) if its == source]
        assert sorted(first[source] + second[source]) == sorted(whole)
        sizes = [sum(map(len, half[source])) for half in halves]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.15)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("no zstd")
    for name, said in (("absent", "absent: No such file"), ("plain.txt", "plain.txt: expected zstd of lines")):
        command = [sys.executable, str(RECIPE), str(tmp_path / name), "--out", str(tmp_path / "halves")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "halves").exists()
