"""The exported fast tokenizer gives our ids on any text, and options that it cannot follow are refused."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megaboat.data.tokenizer import SentencePieceTokenizer, Tokenizer, open_tokenizer, train_model
from megaboat.errors import BadInput
from megaboat.tools.hf_tokenizer import write_fast_tokenizer
from tests.corpus import real_texts

KINDS = ["bpe", "bytes", "bytes+eos"]
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
        ours = (
            open_tokenizer(kind) if kind != "bpe" else SentencePieceTokenizer(train_model(lines(), 900, kind, 1), kind)
        )
        folder = tmp_path_factory.mktemp(kind)
        write_fast_tokenizer(ours, folder)
        found[kind] = ours, AutoTokenizer.from_pretrained(folder)
    return found


def same(pair: tuple[Tokenizer, PreTrainedTokenizerFast], text: str) -> None:
    ours, theirs = pair
    ids = ours.encode(text).tolist()
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_real_and_hard_texts(kind: str, pairs: dict) -> None:
    for text in HARD + real_texts(60)[30:]:
        same(pairs[kind], text)


@settings(max_examples=400, deadline=None)
@given(
    text=st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.text("ab =-\n\u2581_"), st.text("eint \t.0"))
)
def test_any_text(pairs: dict, text: str) -> None:
    for kind in KINDS:
        same(pairs[kind], text)


@pytest.mark.parametrize("kind", KINDS)
def test_symbols_are_known_to_code_and_not_read_from_text(kind: str, pairs: dict) -> None:
    ours, theirs = pairs[kind]
    assert theirs.eos_token_id == ours.eos_id
    assert theirs.bos_token_id == ours.bos_id
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


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    unigram = SentencePieceTokenizer(train_model(lines(), 900, "unigram", 1), "unigram.model")
    with pytest.raises(BadInput, match=r"unigram\.model: a model that is not BPE: not supported"):
        write_fast_tokenizer(unigram, tmp_path)
    assert not list(tmp_path.iterdir())
