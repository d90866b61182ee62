"""The whole way on one machine: corpus, tokenizer, shards, training, evaluation, pictures, export, a sample.

  megaboat quickstart configs/quickstart.yaml

Needs no download: the corpus is text that every Python installation carries. Each stage is a command that it prints
and that you can type yourself. Interrupt it at any time; the same command goes on from there.
"""

import argparse
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from megaboat.config import load_config
from megaboat.engine.run_config import RunConfig
from megaboat.engine.stop import is_done
from megaboat.errors import BadInput

RECIPE = Path("data/embedded.py")
PROMPT = "Return a new string"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="takes precedence over the file")


def run(arguments: argparse.Namespace) -> int:
    config = load_config(RunConfig, arguments.config, arguments.overrides)
    tokens, vocabulary, out = config.data.path, config.model.vocab_size, config.train.out
    if tokens is None or vocabulary is None:
        raise BadInput(f"{arguments.config}: a quickstart needs data.path and model.vocab_size")
    if not RECIPE.is_file():
        raise BadInput(f"{RECIPE}: not here; run this command in megaboat's checkout")
    corpus, tokenizer, export = tokens.parent / "text", tokens.parent / "tokenizer.model", out / "export"
    started = time.monotonic()
    _stage("text that this Python installation carries", [str(RECIPE), "--out", str(corpus)])
    texts = str(corpus / "*.jsonl.zst")
    if not tokenizer.exists():
        learn = ["tokenizer", "train", "--input", texts, "--vocab-size", str(vocabulary), "--out", str(tokenizer)]
        _stage("a tokenizer", ["-m", "megaboat", *learn])
    held_out = ["--val-per-10k", "500"]  # few documents: 5 % give each domain a held-out text worth measuring
    prepare = ["data", "prepare", "--input", texts, "--tokenizer", str(tokenizer), "--out", str(tokens), *held_out]
    _stage("tokens in shards", ["-m", "megaboat", *prepare])
    if not is_done(out, config.train.steps):
        _stage("training", ["-m", "megaboat", "train", str(arguments.config), *arguments.overrides])
        if not is_done(out, config.train.steps):
            raise KeyboardInterrupt  # training caught the signal and saved a checkpoint
    _stage("held-out text, beside simpler models", ["-m", "megaboat", "eval", str(out), "--baselines"])
    _stage("pictures", ["-m", "megaboat", "report", str(out)])
    _stage("an export", ["-m", "megaboat", "convert", "to-hf", str(out), "--out", str(export), "--force"])
    _stage("a sample", ["-m", "megaboat", "generate", str(export), "--prompt", PROMPT, "--max-tokens", "80"])
    print(f"\nDone in {time.monotonic() - started:.0f} s. Look at {out / 'report' / 'index.html'}")
    return 0


def _stage(title: str, arguments: list[str]) -> None:
    """Run one stage as a process of this Python, shown as the command that a person would type."""
    shown = ["megaboat", *arguments[2:]] if arguments[:2] == ["-m", "megaboat"] else ["python", *arguments]
    print(f"\n==> {title}\n$ {shlex.join(shown)}", flush=True)
    process = subprocess.Popen([sys.executable, *arguments])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # the terminal sent the signal to the stage too; let it finish what it is writing
        raise
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code != 0:
        raise BadInput(
            f"the stage {title!r} ended with exit code {code}; its message is above. To start afresh (another Python, "
            "another megaboat), delete the folders of data.path and train.out"
        )
