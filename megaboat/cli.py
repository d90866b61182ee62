"""The `megaboat` command: a table of subcommands, each a module of `megaboat.tools`, imported when it is called."""

import argparse
import logging
import os
import select
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from megaboat import __version__
from megaboat.errors import REFUSED, BadInput, MegaboatError
from megaboat.imports import load

# Each module offers add_arguments(parser) and run(args) -> exit code or None.
COMMANDS = {
    "quickstart": ("megaboat.tools.quickstart", "the whole way on one machine, from text to a sample, in minutes"),
    "train": (
        "megaboat.tools.train",
        "train a model; resumes by itself when the run folder holds a checkpoint",
    ),
    "launch": ("megaboat.tools.launch", "submit training to SLURM, or a sweep of runs as one array"),
    "study": ("megaboat.tools.study", "run a grid of configurations, and report what they say together"),
    "classify": (
        "megaboat.tools.classify",
        "the paper's tasks of sequences and classes: ListOps, pictures, text, sound",
    ),
    "plan": ("megaboat.tools.plan", "parameters, FLOPs, memory and layouts of a configuration; needs no GPU"),
    "eval": ("megaboat.tools.evaluate", "nll, perplexity and bits per byte of a run, domain by domain"),
    "data": ("megaboat.tools.data", "prepare, verify and describe token shards"),
    "generate": ("megaboat.tools.generate", "continue a prompt with a run or an export, token by token"),
    "convert": ("megaboat.tools.convert", "to Hugging Face's format, proved before it is kept, and back"),
    "report": ("megaboat.tools.report", "pictures of a run and one offline page that explains them"),
    "tokenizer": ("megaboat.tools.tokenizer", "train a sentencepiece tokenizer"),
    "balance": ("megaboat.tools.balance", "from a trace: what many ranks would wait for each other"),
    "bench": ("megaboat.tools.bench", "measure steps, kernels, data, decoding and GPUs beside a named peer"),
    "doctor": ("megaboat.tools.doctor", "what is installed, what is missing and how to get it"),
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the commands do; its subparsers too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see '{self.prog} --help'\n")


def build_parser() -> argparse.ArgumentParser:
    """The top parser: global options and the list of commands; a command's own options come with its module."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    parser = Parser(
        prog="megaboat",
        description="Train SeqBoat language models: attention only for the tokens that need it.",
        epilog=f"commands:\n{listing}\n\n'megaboat COMMAND --help' explains one command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megaboat {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 done, 2 bad input, 3 damaged data, 4 diverged, 130 interrupted, 141 where nobody reads the output any more. A rank
    that hangs or loses another ends its process with 5 (`engine.watchdog`).
    """
    chosen = build_parser().parse_args(argv)
    try:
        code = _run(chosen.command, chosen.arguments)
        print(end="", flush=True)
        return code
    except MegaboatError as error:
        print(f"megaboat {chosen.command}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or what is left would be written at the end
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None and error.errno not in REFUSED:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"megaboat {chosen.command}: {where}{error.strerror}", file=sys.stderr)
        return BadInput.exit_code
    except KeyboardInterrupt:
        print(f"megaboat {chosen.command}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _reader_has_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as after `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


def _run(command: str, argv: Sequence[str]) -> int:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a read-only home is no news at each start
    module = load(COMMANDS[command][0])
    parser = Parser(
        prog=f"megaboat {command}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return module.run(_parse(parser, argv)) or 0


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """argparse takes all positional arguments before the first option; overrides may follow one, too."""
    arguments, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in arguments or any(text.startswith("-") or "=" not in text for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
