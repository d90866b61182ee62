"""Text to ids and back. The only file that imports sentencepiece.

Text is encoded line by line (rule `nl1`: cut after each newline, encode, concatenate): the ids are those of the
whole text as long as no piece reaches across a newline, which loading checks; it is faster for BPE and keeps
unigram scores exact on long documents.
"""

import hashlib
import itertools
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import sentencepiece

from megaboat.errors import BadInput

PRETOK = "nl1"
BYTE_TOKENIZERS = ("bytes", "bytes+eos")

# sentencepiece's ModelProto and TrainerSpec field numbers
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35


class Tokenizer(ABC):
    """Ids of a text; `eos_id` and `bos_id` are None where the vocabulary has no such symbol."""

    name: str
    vocab_size: int
    eos_id: int | None
    bos_id: int | None
    sha256: str
    """Hash of the model file, byte for byte."""
    content_id: str
    """Hash of what decides the ids: pieces, scores, types, normaliser, pretok rule; not of training options."""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """int32 ids (n,), without bos and eos."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids; control symbols and ids past the vocabulary give nothing, broken UTF-8 gives U+FFFD."""

    @abstractmethod
    def model_bytes(self) -> bytes | None:
        """The model file's content, None for the built-in byte tokenizers."""


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model file, or its content."""

    def __init__(self, model: bytes, name: str):
        self.name = name
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.content_id = _content_id(model)
        except (RuntimeError, IndexError, KeyError):
            raise BadInput(f"{name}: not a sentencepiece model") from None
        self.vocab_size = self._processor.get_piece_size()
        self.eos_id = _id_or_none(self._processor.eos_id())
        self.bos_id = _id_or_none(self._processor.bos_id())
        self.sha256 = hashlib.sha256(model).hexdigest()
        for index in range(self.vocab_size):
            if "\n" in self._processor.id_to_piece(index)[:-1]:
                raise BadInput(f"{name}: piece {index} reaches across a newline, so text cannot be encoded by lines")

    def encode(self, text: str) -> np.ndarray:
        lines = self._processor.encode(split_lines(text), num_threads=1)
        return np.fromiter(itertools.chain.from_iterable(lines), dtype=np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    def model_bytes(self) -> bytes:
        return self._model


class ByteTokenizer(Tokenizer):
    """Bytes as ids: `bytes` has 256 symbols and no eos (enwik8 style), `bytes+eos` adds id 256 for it.

    Texts are encoded in UTF-8; bytes that were decoded with `surrogateescape` come out as they were.
    """

    def __init__(self, name: str):
        self.name = name
        self.eos_id = 256 if name == "bytes+eos" else None
        self.bos_id = None
        self.vocab_size = 256 if self.eos_id is None else 257
        self.sha256 = self.content_id = hashlib.sha256(f"megaboat {name}".encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(errors="surrogateescape"), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")

    def model_bytes(self) -> None:
        return None


@lru_cache(maxsize=4)
def open_tokenizer(path: Path | str) -> Tokenizer:
    """A sentencepiece model file, or the built-in `bytes` or `bytes+eos`. Raises BadInput for anything else."""
    if str(path) in BYTE_TOKENIZERS:
        return ByteTokenizer(str(path))
    try:
        model = Path(path).read_bytes()
    except OSError as error:
        hint = f"a sentencepiece .model file, or one of {', '.join(BYTE_TOKENIZERS)}"
        raise BadInput(f"tokenizer {path}: {error.strerror}; expected {hint}") from None
    return SentencePieceTokenizer(model, str(path))


def split_lines(text: str) -> list[str]:
    """Cut after each newline, and nowhere else (str.splitlines also cuts at form feeds and U+2028)."""
    lines = text.split("\n")
    whole = [line + "\n" for line in lines[:-1]]
    return whole + lines[-1:] if lines[-1] else whole


def train_model(lines: Sequence[str], vocab_size: int, kind: str, threads: int) -> bytes:
    """A sentencepiece model file trained on all the lines, each below 4,192 bytes, in this order.

    The same lines and arguments give the same bytes in every process. Raises BadInput if the lines do not hold
    enough different pieces for the vocabulary.
    """
    blob = _Blob()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=blob,
            vocab_size=vocab_size,
            model_type=kind,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].split("] ")[-1]
        raise BadInput(f"sentencepiece cannot train a vocabulary of {vocab_size:,}: {reason}") from None
    return bytes(blob.data)


def trainer_version() -> str:
    """The version of sentencepiece, noted beside a trained model."""
    return sentencepiece.__version__


class _Blob:
    """The writer that the trainer asks for."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> None:
        self.data += data


def _id_or_none(index: int) -> int | None:
    return index if index >= 0 else None


def _content_id(model: bytes) -> str:
    """sha256 over the pieces (with scores and types), the normalisers, the kind of model and the pretok rule."""
    digest = hashlib.sha256(f"megaboat-tokenizer/1 {PRETOK}".encode())
    for number, value in proto_fields(model):
        if number in (_PIECES, _NORMALIZER, _DENORMALIZER):
            digest.update(struct.pack("<BI", number, len(value)) + value)
        elif number == _TRAINER:
            options = dict(proto_fields(value))
            kind, fallback = options.get(_MODEL_TYPE, b"\x01"), options.get(_BYTE_FALLBACK, b"\x00")
            digest.update(b"kind" + kind + fallback)
    return digest.hexdigest()


def proto_fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(field number, raw value) of a protobuf message: enough to hash parts of a model without its schema."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        start = position
        wire = key & 7
        if wire == 0:
            _, position = _varint(message, position)
        elif wire == 2:
            length, start = _varint(message, position)
            position = start + length
        else:
            position += {1: 8, 5: 4}[wire]
        yield key >> 3, message[start:position]


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
