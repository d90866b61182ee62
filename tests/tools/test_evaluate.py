"""`megaboat eval` where there is little text, or nowhere to write."""

import errno
import json
import os
import signal
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from megaboat.cli import main
from megaboat.data.dataset import open_dataset
from tests.tools.hf_runs import SMALL, make_dataset, make_run
from tests.tools.hostile import seal


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    return make_run(folder / "run", make_dataset(folder), SMALL)


@pytest.fixture(scope="module")
def bytes_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("eval") / "bytes", None, SMALL, tokenizer="bytes")


def evaluate(run: Path, json_file: Path, *options: str) -> dict:
    assert main(["eval", str(run), "--seq-len", "32", "--json", str(json_file), *options]) == 0
    return json.loads(json_file.read_text())


def test_a_text_of_one_token_has_nothing_to_score(
    bytes_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.txt").write_text("a")
    assert main(["eval", str(bytes_run), "--text", str(tmp_path / "one.txt")]) == 2
    assert "one.txt: nothing to score" in capsys.readouterr().err


def test_a_source_of_one_token_leaves_the_others_theirs(bytes_run: Path, tmp_path: Path) -> None:
    texts = {"short": "a", "long": "import os\n" * 9}
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": name}}) for name, text in texts.items()]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    found = evaluate(bytes_run, tmp_path / "out.json", "--text", str(tmp_path / "texts.jsonl"))
    assert {name: figures["tokens"] for name, figures in found["domains"].items()} == {"long": 89, "short": 0}
    assert found["overall"]["tokens"] == 89
    assert found["overall"]["nll"] == found["domains"]["long"]["nll"]


def test_first_tokens_are_masked_as_in_training(run_folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(run_folder.parent / "tokens")
    sources = [dataset.source("val", name) for name in dataset.splits["val"]]
    targets = sum(source.n_tokens - 1 for source in sources)
    assert evaluate(run_folder, tmp_path / "all.json")["overall"]["tokens"] == targets
    checkpoint = run_folder / "checkpoints" / "step-3"
    config = checkpoint / "config.yaml"
    config.write_text(config.read_text().replace("mask_first_target: false", "mask_first_target: true"))
    seal(checkpoint)
    firsts = sum(source.n_docs - 1 for source in sources)  # nothing in the text comes before the very first
    assert evaluate(run_folder, tmp_path / "masked.json")["overall"]["tokens"] == targets - firsts


def test_documents_without_text_have_nothing_to_score(
    run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One token of documents that begin with a symbol is that symbol."""
    folder, out = run_folder.parent, tmp_path / "begun"
    prepare = ["data", "prepare", "--input", str(folder / "a.jsonl"), "--val", str(folder / "b.jsonl"), "--bos"]
    assert main([*prepare, "--tokenizer", str(folder / "bpe.model"), "--out", str(out), "--workers", "1"]) == 0
    assert main(["eval", str(run_folder), "--data", str(out), "--documents", "--max-tokens", "1"]) == 2
    assert "nothing to score" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_one_line(
    bytes_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("import os")
    endless = tmp_path / ("x" * 300)
    assert main(["eval", str(bytes_run), "--text", str(tmp_path / "text.txt"), "--json", str(endless)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"megaboat eval: {endless}: {os.strerror(errno.ENAMETOOLONG)}"


@pytest.mark.parametrize("buffering", [1, -1], ids=["by line", "whole"])
def test_a_reader_that_has_gone_is_no_traceback(buffering: int, bytes_run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("import os")
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering) as gone, redirect_stdout(gone):
        assert main(["eval", str(bytes_run), "--text", str(tmp_path / "text.txt")]) == 128 + signal.SIGPIPE
