import argparse
from pathlib import Path

import pytest

from megaboat.data.prepare import Request, prepare
from megaboat.tools.bench_data import run
from tests.corpus import real_texts, write_jsonl


def test_the_bench_measures_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_jsonl(tmp_path / "lib.jsonl", real_texts(60))
    prepare(Request({"train": [corpus]}, "bytes", tmp_path / "out"))
    run(argparse.Namespace(data=tmp_path / "out", seconds=0.01))
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if "M tokens/s" in line]
    rates = {line.split("  ")[0]: float(line.split()[-3].replace(",", "")) for line in lines}
    assert len(rates) == 6
    assert min(rates.values()) > 0
    assert "300 B tokens of this kind are 300 GB of text (1.00 bytes a token)" in said
