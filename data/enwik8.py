"""enwik8 in its published split, as token shards of bytes: 90,000,000 to train on, then 5,000,000 and 5,000,000.

The file is the first 100,000,000 bytes of an English Wikipedia dump of 2006 (http://mattmahoney.net/dc/enwik8.zip),
unpacked. `--any` takes another file and cuts it in the same proportions.

example:
  python data/enwik8.py enwik8 --out corpora/enwik8          # corpora/enwik8/tokens, for configs/enwik8.yaml
"""

import argparse
import hashlib
import sys
from pathlib import Path

from megaboat.data.prepare import Request, prepare
from megaboat.data.spill import PrepareOptions
from megaboat.errors import MegaboatError

SIZE, MD5 = 100_000_000, "a1fa5ffddb56f4953e226637dabbb36a"
SPLITS = {"train": 90, "val": 5, "test": 5}


def cut(data: bytes) -> dict[str, bytes]:
    """The splits, in hundredths of the bytes; a character may be cut in two, as it is in the published one."""
    parts, start, shares = {}, 0, 0
    for split, share in SPLITS.items():
        shares += share
        end = len(data) * shares // 100
        parts[split] = data[start:end]
        start = end
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--any", action="store_true", help="another file than enwik8, cut in the same proportions")
    arguments = parser.parse_args()
    try:
        data = arguments.file.read_bytes()
    except OSError as error:
        print(f"enwik8: {arguments.file}: {error.strerror}", file=sys.stderr)
        return 2
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != MD5 and not arguments.any:
        print(
            f"enwik8: {arguments.file}: {len(data):,} bytes with md5 {found}, where enwik8 has {SIZE:,} with {MD5}; "
            "unpack enwik8.zip, or give --any for another text, whose figures compare with nothing published",
            file=sys.stderr,
        )
        return 2
    text = arguments.out / "text"
    text.mkdir(parents=True, exist_ok=True)
    for split, part in cut(data).items():
        (text / f"{split}.txt").write_bytes(part)
    inputs = {split: [text / f"{split}.txt"] for split in SPLITS}
    options = PrepareOptions(default_source=arguments.file.stem, val_per_10k=0)
    try:
        prepare(Request(inputs, "bytes", arguments.out / "tokens", options))
    except MegaboatError as error:
        print(f"enwik8: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments.out / 'tokens'}: " + ", ".join(f"{split} {len(part):,}" for split, part in cut(data).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
