"""`megaboat generate`: whole characters as they come, from runs and checkpoints, and clear words for the rest."""

import shutil
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megaboat.data.tokenizer import Tokenizer, open_tokenizer
from megaboat.data.train_tokenizer import train_tokenizer
from megaboat.errors import DamagedData
from megaboat.tools import generate as command
from megaboat.tools.generate import TextStream
from megaboat.tools.loading import load_run
from tests.corpus import real_texts, write_jsonl
from tests.tools.hf_runs import SMALL, make_run


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("pieces")
    return train_tokenizer([write_jsonl(folder / "a.jsonl", real_texts(10))], 500, folder / "t.model")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "bytes", None, SMALL, tokenizer="bytes+eos")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model as sentencepiece trains it by default: a space before each line, none at its ends."""
    folder = tmp_path_factory.mktemp("foreign")
    lines = [line for text in real_texts(10) for line in text.splitlines() if line]
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=500, model_type="bpe", minloglevel=2
        )
    return folder


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = TextStream(tokenizer)
    parts = [stream.push(token) for token in ids]
    return "".join([*parts, stream.end()])


@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_the_stream_is_the_text(pieces: Tokenizer, text: str) -> None:
    for tokenizer in (pieces, open_tokenizer("bytes")):
        ids = tokenizer.encode(text).tolist()
        stream = TextStream(tokenizer)
        parts = [stream.push(token) for token in ids]
        assert "".join([*parts, stream.end()]) == tokenizer.decode(ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in part for part in parts), "a broken character was shown"


@settings(max_examples=300)
@given(ids=st.lists(st.one_of(st.sampled_from([0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xC3]), st.integers(0, 255))))
def test_broken_bytes_stream_as_they_decode(pieces: Tokenizer, ids: list[int]) -> None:
    assert streamed(open_tokenizer("bytes"), ids) == bytes(ids).decode(errors="replace")
    as_pieces = [index + 3 for index in ids]  # byte pieces follow <unk>, <s> and </s>
    assert streamed(pieces, as_pieces) == pieces.decode(as_pieces)


def test_a_foreign_stream_goes_on_with_the_prompt(foreign: Path) -> None:
    tokenizer = open_tokenizer(foreign / "tokenizer.model")
    ids = tokenizer.encode("import sys, os and time").tolist()
    for cut in range(1, len(ids)):
        stream = TextStream(tokenizer, ids[cut - 1 : cut])
        parts = [stream.push(token) for token in ids[cut:]]
        assert tokenizer.decode(ids[:cut]) + "".join([*parts, stream.end()]) == tokenizer.decode(ids)


def test_ids_of_a_padded_vocabulary_say_nothing(pieces: Tokenizer) -> None:
    ids = pieces.encode("import os").tolist()
    assert streamed(pieces, [*ids, pieces.vocab_size, pieces.vocab_size + 7, *ids]) == "import osimport os"


def generate(*arguments: str) -> int:
    """What the command line does after parsing the command's name."""
    import argparse

    from megaboat.errors import MegaboatError

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    try:
        return command.run(parser.parse_args(arguments)) or 0
    except MegaboatError as error:
        print(f"megaboat generate: {error}", file=sys.stderr)
        return error.exit_code


def test_the_same_seed_gives_the_same_text_from_run_and_checkpoint(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for source in (run_folder, run_folder / "checkpoints" / "step-3"):
        assert generate(str(source), "--prompt", "import os\n", "--max-tokens", "20", "--seed", "5") == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert said[0].startswith("import os\n")
    assert len(said[0]) > len("import os\n")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "\udcff"], "the prompt is not UTF-8"),  # what the byte 0xff of a command line becomes
        (["--prompt", "x", "--top-p", "2"], "top_p in (0, 1]"),
        (["--prompt", "x", "--temperature", "nan"], "temperature and top_k from 0"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str], reason: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(str(run_folder), *arguments) == 2
    complaint = capsys.readouterr().err
    assert reason in complaint
    assert complaint.count("\n") == 1


def test_a_prompt_without_a_token_is_empty(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", foreign, SMALL)
    assert generate(str(run), "--prompt", " ") == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_a_folder_of_something_else_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(str(tmp_path), "--prompt", "x") == 2
    assert f"{tmp_path}: neither a run nor an export" in capsys.readouterr().err
    assert generate(str(tmp_path / "absent"), "--prompt", "x") == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_damaged_checkpoint_names_the_one_before(run_folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    shutil.copytree(run / "checkpoints" / "step-3", run / "checkpoints" / "step-10")
    (run / "checkpoints" / "step-10" / "state.json").write_text("{")
    with pytest.raises(DamagedData, match=r"step-10/state.json: not JSON.*; the checkpoint before it is .*step-3$"):
        load_run(run)
    load_run(run / "checkpoints" / "step-3")
