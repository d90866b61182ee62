"""Where tests find real text: the shared corpus if there is one, else the sources of Python's standard library."""

import json
import os
import sysconfig
from pathlib import Path

import pytest

BESIDE_CHECKOUT = Path(__file__).resolve().parents[2] / "shared" / "corpus"


def corpus_folder() -> Path:
    """The corpus folder: $MEGABOAT_CORPUS, or `../shared/corpus` beside the checkout. Skips the test if absent."""
    folder = Path(os.environ.get("MEGABOAT_CORPUS", BESIDE_CHECKOUT))
    if not folder.is_dir():
        pytest.skip(f"no corpus at {folder}; set MEGABOAT_CORPUS to a folder that holds pile_mini/")
    return folder


def real_texts(count: int, max_chars: int = 20_000) -> list[str]:
    """The first `count` standard library modules as texts, each cut to `max_chars`; equal ones once."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = list(dict.fromkeys(path.read_text(encoding="utf-8", errors="replace")[:max_chars] for path in paths))
    assert len(texts) >= count, "the standard library holds fewer modules than the test asks for"
    return texts[:count]


def write_jsonl(path: Path, texts: list[str], sources: tuple[str, ...] = ("Lib", "Other (x)")) -> Path:
    """Write texts as Pile-style lines, their sources taken in turn."""
    lines = [
        json.dumps({"text": text, "meta": {"pile_set_name": sources[i % len(sources)]}}) for i, text in enumerate(texts)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
    return path
