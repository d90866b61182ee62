import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megaboat.cli import main
from megaboat.data.documents import SENTENCEPIECE_SPACE, parse_line
from megaboat.data.reader import read_lines
from megaboat.data.tokenizer import Tokenizer, open_tokenizer, split_lines
from megaboat.data.train_tokenizer import sample_lines, train_tokenizer
from megaboat.errors import BadInput
from tests.corpus import corpus_folder, real_texts, write_jsonl

HARD_TEXTS = [
    "",
    "\n",
    "\n\n\n",
    "a\tb\r\nc",
    "nul \x00 end",
    "50" + " " * 50 + "spaces",
    "<s> </s> <unk>",
    "👩‍👩‍👧 é é",
    "\x0c\u2028\x85",
]


@pytest.mark.parametrize("text", HARD_TEXTS)
@pytest.mark.parametrize("kind", ["sentencepiece", "bytes", "bytes+eos"])
def test_hard_texts_come_back(text: str, kind: str, tokenizer_file: Path) -> None:
    tokenizer = open_tokenizer(tokenizer_file if kind == "sentencepiece" else kind)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_unicode_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    # The one known exception: sentencepiece writes a space as U+2581, so this character comes back as a space.
    assert tokenizer.decode(ids) == text.replace(SENTENCEPIECE_SPACE, " ")
    assert ids.size == 0 or (ids.min() >= 3 and ids.max() < tokenizer.vocab_size)


def test_no_lines_to_train_on_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_jsonl(tmp_path / "a.jsonl", real_texts(1))
    train = ["tokenizer", "train", "--input", str(texts), "--vocab-size", "400", "--out", str(tmp_path / "t.model")]
    assert main([*train, "--max-lines", "0"]) == 2
    assert "--max-lines 0: at least 1" in capsys.readouterr().err


@settings(max_examples=200)
@given(text=st.text())
def test_lines_join_to_the_text(text: str) -> None:
    lines = split_lines(text)
    assert "".join(lines) == text
    assert all("\n" not in line[:-1] and line for line in lines)


def test_ids_by_line_are_the_ids_of_the_whole_text(tokenizer_file: Path, tokenizer: Tokenizer) -> None:
    whole = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    for text in real_texts(10):
        assert tokenizer.encode(text).tolist() == whole.encode(text)


def test_training_in_two_processes_gives_the_same_bytes(tmp_path: Path) -> None:
    texts = real_texts(30)
    corpora = [write_jsonl(tmp_path / "a.jsonl", texts[:10]), write_jsonl(tmp_path / "z.jsonl", texts[10:])]
    renamed = [
        write_jsonl(tmp_path / "renamed" / "1.jsonl", texts[10:]),
        write_jsonl(tmp_path / "renamed" / "2.jsonl", texts[:10]),
    ]
    for out, inputs in (("one", corpora), ("two", renamed)):
        code = (
            "from pathlib import Path; from megaboat.data.train_tokenizer import train_tokenizer as t;"
            f"t([Path(p) for p in {[str(p) for p in inputs]!r}], 800, Path({str(tmp_path / out)!r} + '.model'),"
            "max_lines=2000)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()
    sidecar = json.loads((tmp_path / "one.json").read_text())
    assert sidecar["content_id"] == open_tokenizer(tmp_path / "two.model").content_id
    assert sidecar["lines"] == 2000


def test_content_id_ignores_the_thread_count_and_sees_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", real_texts(10))
    first = train_tokenizer([corpus], 600, tmp_path / "threads4.model")
    monkeypatch.setattr("megaboat.data.train_tokenizer.THREADS", 1)
    second = train_tokenizer([corpus], 600, tmp_path / "threads1.model")
    third = train_tokenizer([corpus], 601, tmp_path / "larger.model")
    assert first.sha256 != second.sha256
    assert first.content_id == second.content_id != third.content_id


def test_long_lines_are_cut_not_dropped(tmp_path: Path) -> None:
    text = "wxyz " * 5000
    lines = sample_lines([write_jsonl(tmp_path / "long.jsonl", [text])], 1000)
    assert sum(map(len, lines)) == len(text)
    assert max(len(line.encode()) for line in lines) < 4192


def test_refusals_name_the_cause(tmp_path: Path, tokenizer_file: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", real_texts(3))
    with pytest.raises(BadInput, match="exists"):
        train_tokenizer([corpus], 500, tokenizer_file)
    with pytest.raises(BadInput, match="vocabulary of 900,000: .*<= "):
        train_tokenizer([corpus], 900_000, tmp_path / "out.model")
    with pytest.raises(BadInput, match="'body' the key"):
        train_tokenizer([corpus], 500, tmp_path / "out.model", text_key="body")
    with pytest.raises(BadInput, match="No such file"):
        open_tokenizer(tmp_path / "absent.model")
    with pytest.raises(BadInput, match="not a sentencepiece model"):
        open_tokenizer(corpus)
    assert not (tmp_path / "out.model").exists()


def test_a_piece_across_a_newline_is_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(real_texts(3)).split("\n")),
        model_prefix=str(tmp_path / "bad"),
        vocab_size=300,
        user_defined_symbols=["a\nb"],
        minloglevel=2,
    )
    with pytest.raises(BadInput, match="across a newline"):
        open_tokenizer(tmp_path / "bad.model")


@pytest.mark.slow
def test_every_document_of_pile_mini_comes_back(tokenizer: Tokenizer) -> None:
    count = 0
    for path in sorted((corpus_folder() / "pile_mini" / "train").glob("*.zst")):
        for line in read_lines(path):
            text = parse_line(line, "text", "meta.pile_set_name").text
            assert tokenizer.decode(tokenizer.encode(text)) == text.replace(SENTENCEPIECE_SPACE, " ")
            count += 1
    assert count == 2832


def test_bytes_are_their_own_ids() -> None:
    tokenizer = open_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (256, None)
    assert np.array_equal(tokenizer.encode("é"), [0xC3, 0xA9])
    assert (open_tokenizer("bytes+eos").vocab_size, open_tokenizer("bytes+eos").eos_id) == (257, 256)
