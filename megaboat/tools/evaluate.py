"""Held-out figures of a run or an export: nll, perplexity, bits per byte and activation, domain by domain.

megaboat eval runs/quickstart                         the validation split of the data that it was trained on
megaboat eval runs/quickstart --data corpora/other    another dataset made with the same tokenizer
megaboat eval runs/quickstart --text novel.txt        a text of yours
megaboat eval runs/quickstart --documents             each document alone, as `lm_eval` scores the export
megaboat eval runs/enwik8 --split test --context 7000 overlapping rows, each token after 7,000 others or more
megaboat eval runs/quickstart --activation-bias=-2,-1,0,1,2,inf --picture curve.png      quality against FLOPs
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megaboat.data.config import DataConfig
from megaboat.data.dataset import Dataset, open_dataset
from megaboat.data.prepare import Request, prepare
from megaboat.data.spill import PrepareOptions
from megaboat.engine.evaluate import evaluate
from megaboat.engine.ranks import Ranks
from megaboat.errors import BadInput
from megaboat.log import setup_logging
from megaboat.tools import thresholds
from megaboat.tools.baselines import baselines
from megaboat.tools.loading import LoadedRun, load_run
from megaboat.tools.options import output_file
from megaboat.tools.report_page import png

ROWS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN_OR_HF_DIR")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--data", type=Path, metavar="DIR", help="dataset folder; default: the run's own")
    text.add_argument("--text", type=Path, metavar="FILE", help="a text (.txt) or Pile-style jsonl file instead")
    parser.add_argument("--split", default="val", help="default: val")
    parser.add_argument("--max-tokens", type=_positive, metavar="N", help="read at most N tokens of each source")
    parser.add_argument(
        "--documents",
        action="store_true",
        help="read each document alone, after the symbol that ends one, and score its text but not its end: the bits "
        "per byte of EleutherAI's lm_eval (loglikelihood_rolling) with max_length=T",
    )
    parser.add_argument("--seq-len", type=_positive, metavar="T", help="tokens in a row; default: as in training")
    parser.add_argument(
        "--context",
        type=_positive,
        default=0,
        metavar="C",
        help="score the last T - C tokens of each row, which follow C that were scored before: slower, and fairer to "
        "each token than rows that begin with nothing; default: 0",
    )
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="also token unigrams, bigrams and zlib -9; holds the training tokens in memory",
    )
    parser.add_argument(
        "--activation-bias",
        type=thresholds.parse,
        metavar="B,B,...",
        help="also at other thresholds: lowered by B temperatures of each layer, inf: all tokens active",
    )
    parser.add_argument("--picture", type=output_file, metavar="FILE", help="draw the curve of --activation-bias (PNG)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures to a file too")


def run(arguments: argparse.Namespace) -> None:
    setup_logging()
    if arguments.baselines and (arguments.text or arguments.max_tokens or arguments.documents):
        raise BadInput(
            "--baselines reads a whole packed split, and learns from the training split beside it: without --text, "
            "--max-tokens and --documents"
        )
    if arguments.documents and arguments.context:
        raise BadInput("--documents reads each document alone: without --context")
    if arguments.picture and not arguments.activation_bias:
        raise BadInput("--picture draws what --activation-bias measures: name some biases")
    loaded = load_run(arguments.run)
    with tempfile.TemporaryDirectory() as scratch:
        dataset = _dataset(arguments, loaded, Path(scratch))
        if arguments.documents and dataset.start_id is None:
            name = loaded.tokenizer.name
            raise BadInput(
                f"{name}: no symbol stands between documents, so none can be read alone: without --documents"
            )
        evaluate_on = _evaluation(arguments, loaded, dataset)
        result = evaluate_on(loaded.model)
        if not result["overall"]["tokens"]:
            raise BadInput(f"{arguments.text or dataset.path}: nothing to score: no token comes after another")
        peers = baselines(dataset, arguments.split) if arguments.baselines else {}
        biases = arguments.activation_bias or []
        points = thresholds.curve(loaded.model, biases, evaluate_on) if biases else []
    print(table(result, peers))
    if points:
        print("\n" + thresholds.table(points))
    if arguments.picture:
        arguments.picture.write_bytes(png(thresholds.figure(points)))
    if peers and arguments.data is None and arguments.split == "val" and (arguments.run / "checkpoints").is_dir():
        (arguments.run / "baselines.json").write_text(json.dumps(peers, indent=1) + "\n")  # the report shows them
    if arguments.json:
        figures = result | {"baselines": peers, "thresholds": thresholds.as_json(points)}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number above 0")
    return int(text)


def table(result: dict[str, Any], peers: dict[str, dict[str, float]]) -> str:
    """The figures as text: one line a domain, the whole last; peers are bits per byte of other models."""
    heads = ["domain", "tokens", "nll", "perplexity", "bits/byte", "active", *peers]
    lines = [heads]
    for name, figures in {**result["domains"], "overall": result["overall"]}.items():
        active = figures["activation_ratio"]
        line = [name, f"{figures['tokens']:,}", f"{figures['nll']:.4f}", f"{figures['perplexity']:.2f}"]
        line += [f"{figures['bits_per_byte']:.4f}", f"{sum(active) / len(active):.3f}" if active else "-"]
        lines.append(line + [f"{peer[name]:.4f}" for peer in peers.values()])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    )


def _dataset(arguments: argparse.Namespace, loaded: LoadedRun, scratch: Path) -> Dataset:
    if arguments.text is not None:
        if not arguments.text.is_file():
            raise BadInput(f"{arguments.text}: no such file")
        begins = loaded.start_id is not None and loaded.start_id == loaded.tokenizer.bos_id
        options = PrepareOptions(default_source=arguments.text.stem, bos=begins)
        arguments.split = "val"
        prepare(Request({"val": [arguments.text]}, str(loaded.tokenizer_file), scratch / "text", options))
        return open_dataset(scratch / "text")
    path = arguments.data or loaded.data.path
    if path is None:
        raise BadInput(f"{arguments.run} does not say which data it was trained on; name a dataset with --data")
    dataset = open_dataset(path)
    if arguments.split not in dataset.splits:
        raise BadInput(f"{path}: no split {arguments.split!r}; it has {', '.join(dataset.splits)}")
    dataset.check_tokenizer(loaded.tokenizer.content_id, str(arguments.run))
    return dataset


def _evaluation(arguments: argparse.Namespace, loaded: LoadedRun, dataset: Dataset) -> Callable[[Any], dict[str, Any]]:
    """What `evaluate` says of a forward pass, with the data that the options name."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded.model.to(device).eval()
    masks, length = loaded.data.mask_first_target, arguments.seq_len or loaded.data.seq_len
    config = DataConfig(path=dataset.path, seq_len=length, mask_first_target=masks)
    if arguments.context >= config.seq_len:
        raise BadInput(f"--context {arguments.context}: rows have {config.seq_len} tokens, and some must be scored")
    bf16 = device.type == "cuda" and loaded.config.train.precision == "bf16"

    def evaluate_on(forward: Any) -> dict[str, Any]:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            ranks, limit = Ranks(0, 1, device), arguments.max_tokens
            where = forward, config, dataset, ranks, ROWS, limit, arguments.split
            return evaluate(*where, alone=arguments.documents, context=arguments.context)

    return evaluate_on
