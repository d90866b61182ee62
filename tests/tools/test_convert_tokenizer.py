"""The exported fast tokenizer gives our ids on any text, and options that it cannot follow are refused."""

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from tokenizers import models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megaboat.data.tokenizer import SentencePieceTokenizer, Tokenizer, open_tokenizer, train_model
from megaboat.tools.hf_tokenizer import _pieces, write_tokenizer
from tests.corpus import real_texts

KINDS = ["bpe", "bytes", "bytes+eos", "unigram"]
HARD = [
    "",
    "\n",
    " \n  \n\n",
    "a\tb\r\nc",
    "nul \x00",
    "<s></s><unk><0x0A>",
    "\u2581 \u2581a",
    "\ufffd\u2028\x85\U0001f469",
]


def lines() -> list[str]:
    return [line for text in real_texts(30) for line in text.splitlines() if len(line) < 1000]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, PreTrainedTokenizerFast]]:
    """Ours and the exported one, opened by transformers."""
    found = {}
    for kind in KINDS:
        built_in = kind.startswith("bytes")
        ours = open_tokenizer(kind) if built_in else SentencePieceTokenizer(train_model(lines(), 900, kind, 1), kind)
        folder = tmp_path_factory.mktemp(kind)
        write_tokenizer(ours, ours.eos_id, folder)
        found[kind] = ours, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return found


def assert_same(pair: tuple[Tokenizer, PreTrainedTokenizerFast], text: str) -> None:
    ours, theirs = pair
    ids = ours.encode(text).tolist()
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_real_and_hard_texts(kind: str, pairs: dict) -> None:
    for text in HARD + real_texts(60)[30:]:
        assert_same(pairs[kind], text)


@settings(max_examples=400, deadline=None)
@given(
    text=st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.text("ab =-\n\u2581_"), st.text("eint \t.0"))
)
def test_any_text(pairs: dict, text: str) -> None:
    for kind in KINDS:
        assert_same(pairs[kind], text)


def test_symbols_of_the_user_are_read_from_text(tmp_path: Path) -> None:
    symbols = ["import", "    ", " self", "\u2581\u2581", ":\n", "<|code|>"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines()),
        model_writer=model,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=symbols,
        minloglevel=2,
    )
    ours = SentencePieceTokenizer(model.getvalue(), "theirs")
    write_tokenizer(ours, ours.eos_id, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert isinstance(theirs, PreTrainedTokenizerFast)
    for text in ["".join(symbols), *HARD, *real_texts(10)]:
        assert_same((ours, theirs), text)


@pytest.mark.parametrize("kind", KINDS)
def test_symbols_are_known_to_code_and_not_read_from_text(kind: str, pairs: dict) -> None:
    ours, theirs = pairs[kind]
    assert theirs.eos_token_id == ours.eos_id
    assert theirs.bos_token_id == ours.eos_id, "what stood before each text in training"
    assert len(theirs) == ours.vocab_size
    assert theirs.padding_side == "left"
    if ours.eos_id is not None:
        assert ours.eos_id not in theirs("</s>")["input_ids"]
        assert theirs.decode([ours.eos_id, *theirs("x")["input_ids"]], skip_special_tokens=True) == "x"
        assert theirs("x", add_special_tokens=True)["input_ids"] == ours.encode("x").tolist()


def test_a_batch_is_padded_on_the_left(pairs: dict) -> None:
    _, theirs = pairs["bpe"]
    batch = theirs(["x", "import os, sys"], padding=True)
    assert batch["attention_mask"][0][0] == 0
    assert batch["attention_mask"][0][-1] == 1


def test_a_fast_unigram_would_give_other_ids(pairs: dict) -> None:
    """Why sentencepiece itself reads unigram models: scores tie, and its 32-bit sums break the ties."""
    ours, theirs = pairs["unigram"]
    assert not theirs.is_fast
    assert pairs["bpe"][1].is_fast
    scored = [(piece.text, piece.score) for piece in _pieces(ours.model_bytes())]
    fast = Fast(models.Unigram(scored, unk_id=0, byte_fallback=True))
    texts = [line.replace(" ", "\u2581") for text in real_texts(60) for line in text.split("\n")]
    assert any(fast.encode(text).ids != ours.encode(text).tolist() for text in texts)


def test_a_normalising_model_gives_the_same_ids(tmp_path: Path) -> None:
    """NFKC, a space in front, runs of spaces made one, no bytes for what is unknown: as others train sentencepiece."""
    blob = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines()), model_writer=blob, vocab_size=400, minloglevel=2, hard_vocab_limit=False
    )
    ours = SentencePieceTokenizer(blob.getvalue(), "nfkc.model")
    write_tokenizer(ours, ours.eos_id, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    for text in [*HARD, "\u2460 ﬁ  two  spaces", *real_texts(60)[50:]]:
        assert_same((ours, theirs), text)
