"""Train a sentencepiece tokenizer on a corpus, the same bytes every time.

example:
  megaboat tokenizer train --input 'corpora/pile/*.jsonl.zst' --vocab-size 32000 --out corpora/bpe32k.model
"""

import argparse
from pathlib import Path

from megaboat.data.reader import find_inputs
from megaboat.data.train_tokenizer import KINDS, train_tokenizer
from megaboat.log import setup_logging
from megaboat.tools.options import check_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `train` and its options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser(
        "train", help="train a vocabulary", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    train.add_argument("--input", required=True, metavar="GLOB", help="jsonl, txt (also zst, gz) or parquet, quoted")
    train.add_argument("--vocab-size", required=True, type=int, metavar="N", help="number of pieces, e.g. 32000")
    train.add_argument("--out", required=True, type=Path, metavar="FILE", help="model file to write; must not exist")
    train.add_argument("--kind", choices=KINDS, default="bpe", help="default: bpe")
    train.add_argument("--text-key", default="text", metavar="KEY", help="where a line keeps its text; default: text")
    train.add_argument(
        "--max-lines", type=int, default=2_000_000, metavar="N", help="lines to train on, sampled by hash; default: 2M"
    )


def run(args: argparse.Namespace) -> None:
    """Train and print what identifies the result."""
    setup_logging()
    check_least(args, vocab_size=1, max_lines=1)
    inputs = find_inputs(args.input)
    tokenizer = train_tokenizer(
        inputs, args.vocab_size, args.out, args.kind, args.max_lines, args.text_key, progress=True
    )
    print(f"{args.out}: {tokenizer.vocab_size:,} pieces, content id {tokenizer.content_id[:16]}")
