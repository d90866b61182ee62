"""Continue a text with a trained model, token by token as it comes.

megaboat generate runs/quickstart --prompt 'import os'
megaboat generate exports/boat --prompt 'Once' --temperature 0.8 --top-p 0.95 --seed 1
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megaboat.data.tokenizer import Tokenizer
from megaboat.errors import BadInput
from megaboat.model.generate import Sampling, generate
from megaboat.tools.loading import load_run
from megaboat.tools.options import check_least

BROKEN = "\ufffd"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="RUN_OR_HF_DIR", help="run, checkpoint or export folder")
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="what the model continues; '-' reads it all from standard input"
    )
    parser.add_argument("--max-tokens", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0: most probable token; default: 0.8"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="draw from the N most probable tokens")
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="X", help="and from this much probability; default: 0.95"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less")
    parser.add_argument("--seed", type=int, default=0, metavar="N")


def run(arguments: argparse.Namespace) -> None:
    """Print the prompt and its continuation, until the end of the document or --max-tokens."""
    check_least(arguments, max_tokens=1)
    try:
        sampling = Sampling(
            arguments.temperature, arguments.top_k, arguments.top_p, arguments.repetition_penalty, arguments.seed
        )
    except ValueError as error:
        raise BadInput(str(error)) from None
    prompt = _prompt(arguments.prompt)
    loaded = load_run(arguments.source, "cuda" if torch.cuda.is_available() else "cpu")
    ids = loaded.tokenizer.encode(prompt).tolist()
    if not ids:
        raise BadInput("the prompt is empty; a model starts from at least one token")
    stream, eos = TextStream(loaded.tokenizer, ids[-1:]), loaded.tokenizer.eos_id
    _say(prompt)
    for tokens_B in generate(loaded.model, [ids], arguments.max_tokens, sampling, stop_id=eos):
        _say(stream.push(int(tokens_B[0])))
    _say(stream.end() + "\n")


def _prompt(text: str) -> str:
    """The prompt itself, read from standard input where `text` says so. Raises BadInput where it is not UTF-8."""
    try:
        prompt = sys.stdin.read() if text == "-" else text
        prompt.encode()  # bytes of the command line that are none became lone surrogates
    except UnicodeError:
        raise BadInput("the prompt is not UTF-8") from None
    return prompt


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class TextStream:
    """Text of tokens that come one by one: whole characters only, together exactly what decoding all at once gives.

    before: the last token of the text that they continue; a first one may decode without its space.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._ids = list(before)
        self._said = len(tokenizer.decode(self._ids))

    def push(self, token: int) -> str:
        """What became readable with this token; a character's last bytes may still be on their way."""
        self._ids.append(token)
        text = self.tokenizer.decode(self._ids)
        stable = len(text)
        while stable > max(self._said, len(text) - 3) and text[stable - 1] == BROKEN:
            stable -= 1
        new = text[self._said : stable]
        self._said = max(self._said, stable)
        if stable == len(text) and len(self._ids) > 1:
            self._ids = self._ids[-1:]  # one token of context: how the first one decodes may be special
            self._said = len(self.tokenizer.decode(self._ids))
        return new

    def end(self) -> str:
        """What is left, broken characters as U+FFFD."""
        return self.tokenizer.decode(self._ids)[self._said :]
