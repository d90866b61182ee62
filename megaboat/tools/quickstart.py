"""The whole way on one machine: corpus, tokenizer, shards, training, evaluation, pictures, export, a sample.

  megaboat quickstart configs/quickstart.yaml

Needs no download: the corpus is text that every Python installation carries. Each stage is a command that it prints
and that you can type yourself. Interrupt it at any time; the same command goes on from there, also after this Python
or its packages were upgraded: the corpus stays as it was made.
"""

import argparse
import shlex
import shutil
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
MEGABOAT = ["-m", "megaboat"]
PROMPT = "Return a new string"


class StageFailed(Exception):
    """A stage did not end well, and has said why."""


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
    corpus, tokenizer = tokens.parent / "text", tokens.parent / "tokenizer.model"
    started = time.monotonic()
    try:
        _make_shards(corpus, tokenizer, tokens, vocabulary)
        _make_model(arguments, config)
    except StageFailed as error:
        raise BadInput(f"{error}. To start afresh, delete {corpus}, {tokenizer}, {tokens} and {out}") from None
    print(f"\nDone in {time.monotonic() - started:.0f} s. Look at {out / 'report' / 'index.html'}")
    return 0


def _make_shards(corpus: Path, tokenizer: Path, tokens: Path, vocabulary: int) -> None:
    _stage("text that this Python installation carries", [str(RECIPE), "--out", str(corpus), "--keep"])
    texts = str(corpus / "*.jsonl.zst")
    if not tokenizer.exists():
        learn = ["--input", texts, "--vocab-size", str(vocabulary), "--out", str(tokenizer)]
        _stage("a tokenizer", [*MEGABOAT, "tokenizer", "train", *learn])
    held_out = ["--val-per-10k", "500"]  # few documents: 5 % give each domain a held-out text worth measuring
    prepare = ["--input", texts, "--tokenizer", str(tokenizer), "--out", str(tokens), *held_out]
    _stage("tokens in shards", [*MEGABOAT, "data", "prepare", *prepare])


def _make_model(arguments: argparse.Namespace, config: RunConfig) -> None:
    out = config.train.out
    if not is_done(out, config.train.steps):
        _stage("training", [*MEGABOAT, "train", str(arguments.config), *arguments.overrides])
        if not is_done(out, config.train.steps):
            raise KeyboardInterrupt  # training caught the signal and saved a checkpoint
    export = str(out / "export")
    _stage("held-out text, beside simpler models", [*MEGABOAT, "eval", str(out), "--baselines"])
    _stage("pictures", [*MEGABOAT, "report", str(out)])
    _stage("an export", [*MEGABOAT, "convert", "to-hf", str(out), "--out", export, "--force"])
    _stage("a sample", [*MEGABOAT, "generate", export, "--prompt", PROMPT, "--max-tokens", "80"])


def _stage(title: str, arguments: list[str]) -> None:
    """Run one stage as a process of this Python, shown as the command that a person would type."""
    is_ours = arguments[:2] == MEGABOAT
    shown = [_program("megaboat"), *arguments[2:]] if is_ours else [_program("python"), *arguments]
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
        raise StageFailed(f"the stage {title!r} ended with exit code {code}; its message is above")


def _program(name: str) -> str:
    """A program of this Python's environment, as short as it can be typed here."""
    path = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(path):
        return name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
