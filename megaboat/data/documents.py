"""One line of jsonl to one document, or the reason why not; document identity and split."""

import json
import re
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NoReturn

from megaboat.data.lines import Line

SPLIT_STEPS = 10_000
SENTENCEPIECE_SPACE = "\u2581"
_SLUG_LENGTH = 60


@dataclass(frozen=True)
class Document:
    """A text with its source as the corpus writes it (None: the line does not say)."""

    text: str
    source: str | None

    @property
    def content_hash(self) -> int:
        """blake2b64 of the text's bytes: equal for exact copies."""
        return int.from_bytes(blake2b(self.data, digest_size=8).digest(), "little")

    @property
    def data(self) -> bytes:
        """The text in UTF-8; bytes that were none (of a byte corpus) as they were."""
        return self.text.encode(errors="surrogateescape")


@dataclass(frozen=True)
class Rejected:
    """A line that holds no usable document."""

    reason: str


def parse_line(line: Line, text_key: str, source_key: str, replace_surrogates: bool = False) -> Document | Rejected:
    """Read one JSON object; `text_key` and `source_key` are dotted paths into it. Nothing is raised."""
    if line.data is None:
        return Rejected("line too long")
    try:
        record = json.loads(line.data.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        return Rejected("invalid UTF-8")
    except _NotANumber:
        return Rejected("NaN or Infinity")
    except (ValueError, RecursionError):
        return Rejected("not JSON")
    if not isinstance(record, dict):
        return Rejected("not an object")
    text = _at(record, text_key)
    if text is None:
        return Rejected(f"no {text_key!r}")
    if not isinstance(text, str):
        return Rejected(f"{text_key!r} is not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        if not replace_surrogates:
            return Rejected("lone surrogate")
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    source = _at(record, source_key)
    return Document(text, source if isinstance(source, str) and source.strip() else None)


def slug(source: str) -> str:
    """A file-name form of a source: lower case, no dots (webdataset cuts a key at the first one)."""
    return re.sub(r"[^a-z0-9]+", "-", source.lower()).strip("-")[:_SLUG_LENGTH].strip("-") or "source"


def document_uid(file_sha256: str, line_number: int) -> tuple[int, int]:
    """128 bits that say which document this is, and, as they are evenly spread, where the shuffle puts it."""
    digest = blake2b(f"{file_sha256}:{line_number}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def is_validation(content_hash: int, steps: int, salt: str) -> bool:
    """Whether the document is among the `steps` in 10,000 held out. Depends on its text and the salt alone."""
    digest = blake2b(content_hash.to_bytes(8, "little"), digest_size=8, key=salt.encode()).digest()
    return int.from_bytes(digest, "little") % SPLIT_STEPS < steps


class _NotANumber(Exception):
    """JSON has no NaN; Python's parser would accept it."""


def _refuse_constant(name: str) -> NoReturn:
    raise _NotANumber(name)


def _at(record: dict[str, Any], key: str) -> Any:
    """The value at a dotted path, None where a step is missing."""
    value: Any = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
