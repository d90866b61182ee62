"""Checkpoints to Hugging Face folders and back.

  megaboat convert to-hf runs/quickstart --out exports/boat
  megaboat convert from-hf exports/boat --out runs/continued

`to-hf` takes the newest checkpoint of a run (or the checkpoint folder named) and finishes only if a process without
megaboat, with torch and transformers alone, repeats the model's logits, decisions and greedy tokens on held-out text.
`from-hf` makes a run folder that `megaboat train` goes on with; AdamW's moments start at zero.
"""

import argparse
import math
from pathlib import Path

from megaboat.errors import BadInput
from megaboat.log import setup_logging
from megaboat.tools.hf_export import export, import_export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `to-hf` and `from-hf`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="to-hf|from-hf")
    outwards = actions.add_parser("to-hf", help="export a run for Hugging Face")
    outwards.add_argument("source", type=Path, metavar="RUN", help="run folder, or one of its checkpoint folders")
    outwards.add_argument("--license", default="unknown", help="for the model card, e.g. apache-2.0")
    outwards.add_argument(
        "--text", type=Path, metavar="FILE", help="held-out text to prove the export on; default: the validation split"
    )
    outwards.add_argument("--shard-gb", type=float, default=2.0, metavar="GB", help="size of a weight file; default: 2")
    inwards = actions.add_parser("from-hf", help="a run folder to continue training from")
    inwards.add_argument("source", type=Path, metavar="DIR", help="folder that to-hf wrote")
    for action in (outwards, inwards):
        action.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
        action.add_argument("--force", action="store_true", help="replace an older export or run there")


def run(arguments: argparse.Namespace) -> None:
    setup_logging()
    if arguments.action == "from-hf":
        folder = import_export(arguments.source, arguments.out, arguments.force)
        print(f"{folder}: weights, step and data position of the export; AdamW's moments are zero")
        return
    if not 0 < arguments.shard_gb < math.inf:
        raise BadInput(f"--shard-gb {arguments.shard_gb}: give a size above 0")
    shard_bytes = int(arguments.shard_gb * 1e9)
    proof = export(arguments.source, arguments.out, arguments.license, arguments.text, shard_bytes, arguments.force)
    decisions = f", {proof['decisions']:,} decisions" if proof["decisions"] else ""
    print(
        f"{arguments.out}: proved in a process without megaboat on {proof['text']}: {proof['tokens']:,} tokens with "
        f"logits within {proof['largest_logit_difference']}{decisions}, {proof['greedy_tokens']} greedy tokens and "
        f"{proof['tokenizer_ids']:,} tokenizer ids are the same"
    )
