"""Our tokenizers as Hugging Face tokenizers that give the same ids: fast ones where these can, else `hf_pieces`.

Text is cut after each newline, spaces become U+2581, and what no piece covers becomes bytes, as sentencepiece does.
Symbols such as `</s>` are plain text when they stand in a text: only code that adds their id means them.
"""

import json
import shutil
import struct
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from megaboat.data.tokenizer import Tokenizer, proto_fields

SPACE = "\u2581"
# sentencepiece's ModelProto: field numbers, piece types and kinds of model
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 1, 2, 3
MODEL_TYPE, BYTE_FALLBACK = 3, 35
CHARSMAP, DUMMY_PREFIX, EXTRA_SPACES, ESCAPE_SPACES = 2, 3, 4, 5
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
BPE = b"\x02"
SOURCE, CLASS = "tokenization_seqboat", "SeqBoatTokenizer"


class Piece(NamedTuple):
    """An entry of a sentencepiece vocabulary."""

    text: str
    score: float
    kind: int


def write_tokenizer(tokenizer: Tokenizer, start_id: int | None, folder: Path) -> None:
    """Write tokenizer_config.json and tokenizer.json; for sentencepiece tokenizer.model, and where a fast tokenizer
    would give other ids, SOURCE in place of tokenizer.json. `start_id`: what is read before a text, its `bos_token`.
    """
    model = tokenizer.model_bytes()
    if model is None:
        pieces = [Piece(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
        pieces += [Piece("</s>", 0.0, CONTROL)] * (tokenizer.vocab_size - 256)
        fast = _assemble(pieces)
    else:
        (folder / "tokenizer.model").write_bytes(model)
        pieces = _pieces(model)
        if not _is_fast(model):
            shutil.copyfile(Path(__file__).with_name("hf_pieces.py"), folder / f"{SOURCE}.py")
            own = {"tokenizer_class": CLASS, "auto_map": {"AutoTokenizer": [f"{SOURCE}.{CLASS}", None]}}
            _write_config(tokenizer, start_id, pieces, folder, own)
            return
        fast = _assemble(pieces)
        fast.normalizer = normalizers.Replace(" ", SPACE)
        fast.pre_tokenizer = pre_tokenizers.Split(Regex("\n"), "merged_with_previous")
    fast.save(str(folder / "tokenizer.json"))
    _write_config(tokenizer, start_id, pieces, folder, {"tokenizer_class": "PreTrainedTokenizerFast"})


def _pieces(model: bytes) -> list[Piece]:
    pieces = []
    for number, value in proto_fields(model):
        if number == PIECES:
            fields = dict(proto_fields(value))
            kind = int.from_bytes(fields.get(PIECE_TYPE, b"\x01"), "little")
            (score,) = struct.unpack("<f", fields.get(PIECE_SCORE, bytes(4)))
            pieces.append(Piece(fields[PIECE_TEXT].decode(), score, kind))
    return pieces


def _is_fast(model: bytes) -> bool:
    """Whether a fast tokenizer gives the ids of this sentencepiece model.

    A unigram model has many segmentations of one score (n spaces as 8 + 3 or 3 + 8); sentencepiece chooses among them
    by the rounding of its 32-bit sums, which no fast tokenizer repeats.
    """
    parts = dict(proto_fields(model))
    trainer = dict(proto_fields(parts.get(TRAINER, b"")))
    normalizer = dict(proto_fields(parts.get(NORMALIZER, b"")))
    return (
        trainer.get(MODEL_TYPE, b"\x01") == BPE
        and trainer.get(BYTE_FALLBACK, b"\x00") == b"\x01"
        and not normalizer.get(CHARSMAP)
        and normalizer.get(DUMMY_PREFIX, b"\x01") == b"\x00"
        and normalizer.get(EXTRA_SPACES, b"\x01") == b"\x00"
        and normalizer.get(ESCAPE_SPACES, b"\x01") != b"\x00"
    )


def _bpe(pieces: list[Piece]) -> models.BPE:
    """sentencepiece merges the neighbours whose union has the best score; here each such pair has a rank."""
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    usable = {piece.text for piece in pieces if piece.kind == NORMAL}
    ranked = sorted((piece for piece in pieces if piece.kind == NORMAL), key=lambda piece: -piece.score)
    merges = []
    for piece in ranked:
        pairs = [(piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text))]
        pairs = [pair for pair in pairs if pair[0] in usable and pair[1] in usable]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return models.BPE(ids, merges, unk_token=None, fuse_unk=False, byte_fallback=True)


def _assemble(pieces: list[Piece]) -> FastTokenizer:
    fast = FastTokenizer(_bpe(pieces))
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    symbols = [piece.text for piece in pieces if piece.kind in (CONTROL, UNKNOWN)]
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in symbols])
    # sentencepiece looks for them where spaces are U+2581 already, and so finds none that has a space.
    added = [piece.text for piece in pieces if piece.kind == USER_DEFINED and " " not in piece.text]
    fast.add_tokens([AddedToken(text, special=False, normalized=True) for text in added])
    return fast


def _write_config(
    tokenizer: Tokenizer, start_id: int | None, pieces: list[Piece], folder: Path, reader: dict[str, Any]
) -> None:
    def text(index: int | None) -> str | None:
        return None if index is None else pieces[index].text

    unknown = next((piece.text for piece in pieces if piece.kind == UNKNOWN), None)
    symbols = {"bos_token": text(start_id), "eos_token": text(tokenizer.eos_id), "unk_token": unknown}
    config: dict[str, Any] = {name: symbol for name, symbol in symbols.items() if symbol is not None}
    if tokenizer.eos_id is not None:
        config["pad_token"] = text(tokenizer.eos_id)
    config |= reader | {
        "padding_side": "left",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 40,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
