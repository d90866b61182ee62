"""Turn text into token shards, check them, describe them.

examples:
  megaboat data prepare --input 'corpora/pile/*.jsonl.zst' --tokenizer corpora/bpe32k.model --out corpora/pile-32k
  megaboat data prepare --input enwik8-train.txt --val enwik8-val.txt --tokenizer bytes --out corpora/enwik8
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from megaboat.config import build_config
from megaboat.data.dataset import open_dataset
from megaboat.data.index import dataset_id
from megaboat.data.picture import draw_stats
from megaboat.data.prepare import Request, prepare
from megaboat.data.reader import find_inputs
from megaboat.data.spill import PrepareOptions
from megaboat.data.stats import dataset_stats, stats_table
from megaboat.data.verify import verify_dataset
from megaboat.errors import BadInput, DamagedData
from megaboat.log import setup_logging
from megaboat.tools.options import output_file

PICTURES = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_prepare(actions)
    verify = actions.add_parser("verify", help="check every byte and count of a dataset against its index")
    verify.set_defaults(function=_verify)
    verify.add_argument("data", type=Path, metavar="DIR", help="dataset folder")
    verify.add_argument("--workers", type=int, metavar="N", help="processes; default: one a core")
    stats = actions.add_parser("stats", help="documents, tokens and lengths per source, as a table and a picture")
    stats.set_defaults(function=_stats)
    stats.add_argument("data", type=Path, metavar="DIR", help="dataset folder")
    stats.add_argument(
        "--picture",
        type=output_file,
        metavar="FILE",
        help="png, svg or pdf to write; default: stats.png in the current folder",
    )


def run(args: argparse.Namespace) -> int | None:
    """Do the chosen action."""
    setup_logging()
    action: Callable[[argparse.Namespace], int | None] = args.function
    return action(args)


def _add_prepare(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "prepare",
        help="tokenise a corpus into shards; run the same command again to go on after an interruption",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(function=_prepare)
    parser.add_argument("--input", required=True, metavar="GLOB", help="jsonl, txt (also zst, gz) or parquet, quoted")
    parser.add_argument("--val", metavar="GLOB", help="validation files; without: some documents are held out")
    parser.add_argument("--test", metavar="GLOB", help="test files")
    parser.add_argument(
        "--tokenizer", required=True, metavar="FILE", help="a .model file, or `bytes` (256 ids) or `bytes+eos` (257)"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="dataset folder to write")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one a core")
    parser.add_argument(
        "--val-per-10k", type=int, metavar="N", help="documents in 10,000 held out by hash; default: 50, with --val 0"
    )
    parser.add_argument("--text-key", metavar="KEY", help="where a line keeps its text; default: text")
    parser.add_argument("--source-key", metavar="KEY", help="and its source; default: meta.pile_set_name")
    parser.add_argument("--default-source", metavar="NAME", help="source of documents that name none")
    parser.add_argument("--dedup", choices=["exact", "off"], help="drop exact copies; default: exact")
    parser.add_argument("--bos", action="store_true", default=None, help="begin documents with the bos symbol")
    parser.add_argument("--bad-lines", choices=["quarantine", "fail"], help="default: quarantine, listed in a file")
    parser.add_argument("--surrogates", choices=["quarantine", "replace"], help="lone surrogates; default: quarantine")
    parser.add_argument("--empty", choices=["drop", "keep"], help="texts of white space only; default: drop")
    parser.add_argument("--max-bad-per-million", type=int, metavar="N", help="more bad lines stop; default: 100")
    parser.add_argument("--max-line-bytes", type=int, metavar="N", help="longer lines are bad; default: 256 MiB")
    parser.add_argument("--allow-empty-files", action="store_true", default=None, help="accept files without documents")
    parser.add_argument("--salvage", action="store_true", default=None, help="keep the sound part of damaged files")


def _prepare(args: argparse.Namespace) -> None:
    workers = _workers(args)
    given = {name: value for name in PrepareOptions.model_fields if (value := getattr(args, name, None)) is not None}
    if args.val and args.val_per_10k is None:
        given["val_per_10k"] = 0
    options = build_config(PrepareOptions, given, "the command line")
    inputs = {"train": find_inputs(args.input)}
    for split in ("val", "test"):
        if pattern := getattr(args, split):
            inputs[split] = find_inputs(pattern, f"--{split}")
    index = prepare(Request(inputs, args.tokenizer, args.out, options), workers, progress=True)
    for split, sources in index["splits"].items():
        tokens, documents = (sum(entry[key] for entry in sources.values()) for key in ("n_tokens", "n_docs"))
        print(f"{split}: {documents:,} documents, {tokens:,} tokens, {len(sources)} sources")
    print(f"{args.out}: dataset {dataset_id(args.out)[:16]}")


def _verify(args: argparse.Namespace) -> None:
    faults = verify_dataset(args.data, _workers(args), progress=True)
    if faults:
        raise DamagedData("\n".join(faults))
    print(f"{args.data}: sound; dataset {dataset_id(args.data)[:16]}")


def _stats(args: argparse.Namespace) -> None:
    picture = args.picture or output_file("stats.png")
    if picture.suffix not in PICTURES:
        raise BadInput(f"--picture {picture}: the suffix says the format, one of {', '.join(PICTURES)}")
    stats = dataset_stats(open_dataset(args.data))
    print(stats_table(stats))
    split = stats[0].split
    shown = [entry for entry in stats if entry.split == split]
    tokens = sum(entry.tokens for entry in shown)
    draw_stats(shown, f"{args.data.resolve().name}, {split}: {tokens:,} tokens in {len(shown)} sources", picture)
    print(f"picture: {picture}")


def _workers(args: argparse.Namespace) -> int:
    if args.workers is not None and args.workers < 1:
        raise BadInput(f"--workers {args.workers}: at least 1")
    return args.workers or len(os.sched_getaffinity(0))
