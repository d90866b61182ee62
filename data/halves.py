"""Deal the documents of a held-out file to two files of equal size and mixture: one to choose by, one to report on.

Source by source, the longest document first, each goes where the source has fewer bytes so far. The only document of a
source (a book, say) is cut in two at the line break nearest its middle, so that both files have every source.

example:
  python data/halves.py pile_mini/val.jsonl.zst --out corpora/halves      # corpora/halves/val.jsonl.zst, test.jsonl.zst
"""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import zstandard

NAMES, LEVEL = ("val", "test"), 19

Document = dict[str, Any]


def halves(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """The two halves, each in the order of the file. A document has `text` and `meta.pile_set_name`."""
    by_source: dict[str, list[int]] = {}
    for place, document in enumerate(documents):
        by_source.setdefault(document["meta"]["pile_set_name"], []).append(place)
    dealt: tuple[dict[int, Document], dict[int, Document]] = ({}, {})
    for places in by_source.values():
        if len(places) == 1:
            document = documents[places[0]]
            middle = document["text"].rfind("\n", 0, len(document["text"]) // 2) + 1
            for half, text in zip(dealt, (document["text"][:middle], document["text"][middle:]), strict=True):
                half[places[0]] = document | {"text": text}
            continue
        sizes = [0, 0]
        for place in sorted(places, key=lambda place: -len(documents[place]["text"])):
            smaller = int(sizes[1] < sizes[0])
            dealt[smaller][place] = documents[place]
            sizes[smaller] += len(documents[place]["text"])
    first, second = ([half[place] for place in sorted(half)] for half in dealt)
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, metavar="FILE.jsonl.zst")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    try:
        with arguments.input.open("rb") as file:
            text = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8", newline="\n")
            dealt = halves([json.loads(line) for line in text])
    except OSError as error:
        parser.exit(2, f"halves: {arguments.input}: {error.strerror}\n")
    except (zstandard.ZstdError, ValueError, KeyError, TypeError) as error:
        what = 'expected zstd of lines {"text": ..., "meta": {"pile_set_name": ...}}'
        parser.exit(2, f"halves: {arguments.input}: {what} ({error})\n")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, half in zip(NAMES, dealt, strict=True):
        lines = "".join(json.dumps(document) + "\n" for document in half)
        (arguments.out / f"{name}.jsonl.zst").write_bytes(zstandard.ZstdCompressor(LEVEL).compress(lines.encode()))
        size = sum(len(document["text"].encode()) for document in half)
        print(f"{arguments.out / f'{name}.jsonl.zst'}: {len(half)} documents, {size:,} bytes of text")


if __name__ == "__main__":
    main()
