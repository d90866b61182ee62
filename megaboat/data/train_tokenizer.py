"""Train a tokenizer reproducibly: lines sampled by hash, in an order that no file name or process decides."""

import hashlib
import heapq
import json
import os
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from megaboat.data.documents import Rejected, parse_line
from megaboat.data.reader import is_plain_text, read_lines, read_whole
from megaboat.data.tokenizer import Tokenizer, open_tokenizer, split_lines, train_model, trainer_version
from megaboat.errors import BadInput
from megaboat.log import get_logger

# sentencepiece silently skips lines of 4,192 bytes and more.
MAX_PIECE_BYTES = 4_000
# The thread count is stored in the model file, so it is the same everywhere.
THREADS = 4
KINDS = ("bpe", "unigram")


def train_tokenizer(
    inputs: list[Path],
    vocab_size: int,
    out: Path,
    kind: str = "bpe",
    max_lines: int = 2_000_000,
    text_key: str = "text",
    progress: bool = False,
) -> Tokenizer:
    """Train on at most `max_lines` lines of the files; write the model to `out` and a sidecar `<out stem>.json`.

    Raises BadInput when there is no text, when it is too little for the vocabulary, or when `out` exists.
    """
    if out.exists():
        raise BadInput(f"{out} exists; tokenizers are never written over")
    lines = sample_lines(inputs, max_lines, text_key, progress)
    if not lines:
        raise BadInput(f"no text in {len(inputs)} input file(s); is {text_key!r} the key of the text?")
    get_logger().info("training a %s vocabulary of %s on %s lines", kind, f"{vocab_size:,}", f"{len(lines):,}")
    model = train_model(lines, vocab_size, kind, THREADS)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.tmp{os.getpid()}")
    temporary.write_bytes(model)
    tokenizer = open_tokenizer(temporary)
    sidecar = {
        "format": "megaboat-tokenizer/1",
        "kind": kind,
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "content_id": tokenizer.content_id,
        "max_lines": max_lines,
        "lines": len(lines),
        "lines_sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
        "threads": THREADS,
        "sentencepiece": trainer_version(),
    }
    out.with_suffix(".json").write_text(json.dumps(sidecar, indent=1, sort_keys=True) + "\n")
    temporary.rename(out)
    return open_tokenizer(out)


def sample_lines(inputs: list[Path], max_lines: int, text_key: str = "text", progress: bool = False) -> list[str]:
    """The `max_lines` lines with the smallest hashes, sorted by hash.

    A line's hash covers its document's text and its place there, so that neither file names nor file order matter
    and frequent lines stay as frequent as they are.
    """
    largest: list[tuple[int, str]] = []  # a heap on the negated hash: its top is the first to be displaced
    texts = tqdm(_texts(inputs, text_key), desc="reading", unit=" documents", disable=not progress)
    for key, piece in (keyed for text in texts for keyed in _keyed_pieces(text)):
        if len(largest) < max_lines:
            heapq.heappush(largest, (-key, piece))
        elif (-key, piece) > largest[0]:
            heapq.heapreplace(largest, (-key, piece))
    return [piece for _, piece in sorted(largest, reverse=True)]


def _keyed_pieces(text: str) -> Iterator[tuple[int, str]]:
    seed = hashlib.blake2b(text.encode(), digest_size=16).digest()
    for number, piece in enumerate(_pieces(text)):
        digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8, key=seed).digest()
        yield int.from_bytes(digest, "little"), piece


def _texts(inputs: list[Path], text_key: str) -> Iterator[str]:
    """Texts of every readable document; plain text is one document."""
    for path in inputs:
        if is_plain_text(path):
            yield read_whole(path).decode(errors="replace")
            continue
        for line in read_lines(path, keys=(text_key,)):
            parsed = parse_line(line, text_key, text_key)
            if not isinstance(parsed, Rejected):
                yield parsed.text


def _pieces(text: str) -> Iterator[str]:
    """Lines without their newline, cut where they are too long for the trainer."""
    for line in split_lines(text):
        line = line.rstrip("\n")
        for start in range(0, len(line), MAX_PIECE_BYTES // 4):
            yield line[start : start + MAX_PIECE_BYTES // 4]
