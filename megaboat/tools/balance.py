"""What many ranks would wait for each other, from the trace of a run.

  megaboat balance simulate runs/quickstart --ranks 64,512,4096,16384 --accumulate 8 --picture balance.png

A run writes its trace as it trains: every `balance.trace_every` steps a line with what each window of the batch
activated and how long each rank worked.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from megaboat.errors import BadInput
from megaboat.parallel.balance.simulate import Case, Check, Result, check, fit_trace, simulate
from megaboat.parallel.balance.trace import Trace, read_trace
from megaboat.tools.balance_figures import slow_down_figure
from megaboat.tools.options import check_least, output_file
from megaboat.tools.report_page import png

LIMITS = (
    "Limits: windows are drawn independently of each other, networks are never busy, and hardware is even but for "
    "--jitter. On a GPU the trace times forward passes only."
)
HEADS = ("ranks", "zero", "accumulate", "assignment", "node", "slow-down", "5 to 95 %", "rule", "of dense", "memory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="balance", required=True, metavar="simulate")
    command = commands.add_parser("simulate", help="slow-down against the number of ranks, by way of training")
    command.add_argument("trace", type=Path, metavar="TRACE", help="trace.jsonl, or the folder of the run")
    said = "; default: %(default)s"
    command.add_argument(
        "--ranks", type=_numbers, default="8,64,512,4096,16384", metavar="N,N,...", help="default: %(default)s"
    )
    command.add_argument("--zero", type=_syncs, default="1,3", metavar="1,2,3,layer", help=f"when ranks meet{said}")
    command.add_argument(
        "--accumulate", type=_numbers, default="1,8", metavar="N,N,...", help=f"micro-batches a step{said}"
    )
    command.add_argument("--micro-batch", type=int, default=1, metavar="N", help=f"windows in a micro-batch{said}")
    command.add_argument("--node", type=int, default=0, metavar="N", help="also: N ranks even out rows layer by layer")
    command.add_argument("--link", type=float, default=350.0, metavar="GB/s", help=f"inside a node{said}")
    command.add_argument("--prefetch", type=int, default=2, metavar="LAYERS", help=f"ZeRO-3: gathered ahead{said}")
    command.add_argument("--jitter", type=float, default=0.0, metavar="SHARE", help=f"deviation of ranks' speeds{said}")
    command.add_argument("--trials", type=int, default=20, metavar="N", help=f"steps to draw{said}")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    command.add_argument("--json", type=output_file, metavar="FILE", help="write the figures to a file too")
    command.add_argument("--picture", type=output_file, metavar="FILE", help="draw slow-down against ranks (PNG)")


def run(arguments: argparse.Namespace) -> None:
    check_least(arguments, micro_batch=1, node=0, prefetch=1, trials=1, jitter=0, seed=0)
    if not arguments.link > 0:
        raise BadInput(f"--link {arguments.link:g}: GB/s, above 0")
    trace = read_trace(arguments.trace)
    fit, checked = fit_trace(trace), check(trace)
    results = {case: simulate(trace, fit, case, arguments.trials, arguments.seed) for case in cases(arguments)}
    print(preface(trace, checked, fit.r2))
    print(table(results))
    print(LIMITS)
    if arguments.json:
        arguments.json.write_text(json.dumps(_figures(trace, checked, results), indent=1) + "\n")
    if arguments.picture:
        arguments.picture.write_bytes(png(slow_down_figure(results)))


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Every combination that the options ask for."""
    nodes = [0, arguments.node] if arguments.node > 1 else [0]
    ways = itertools.product(
        arguments.ranks, arguments.zero, arguments.accumulate, ("random", "domain", "predicted", "perfect"), nodes
    )
    return [
        Case(
            ranks,
            sync,
            accumulate,
            arguments.micro_batch,
            assignment,
            node,
            arguments.prefetch,
            arguments.link * 1e9,
            arguments.jitter,
        )  # fmt: skip
        for ranks, sync, accumulate, assignment, node in ways
        if not node or ranks % node == 0
    ]


def preface(trace: Trace, checked: Check, r2: float) -> str:
    """What the trace is, and how far its own steps agree with the model of their time."""
    cost = trace.rows_NL.sum(1)
    spread = cost.std() / max(cost.mean(), 1e-9)
    error = checked.foretold / checked.measured - 1
    return (
        f"{len(trace.rows_NL):,} windows of {trace.steps} steps; active rows of a window vary by {100 * spread:.1f} %; "
        f"the predictor explains {100 * trace.predictor_r2:.0f} % of the spread inside domains\n"
        f"time against work: {100 * r2:.0f} % explained; slowest rank of the steps that the fit did not see: measured "
        f"{1000 * checked.measured:.1f} ms, foretold {1000 * checked.foretold:.1f} ms ({100 * error:+.1f} %)"
    )


def table(results: dict[Case, Result]) -> str:
    """One line a case."""
    lines = [HEADS]
    for case, result in results.items():
        way = (f"{case.ranks:,}", case.sync, str(case.accumulate), case.assignment, str(case.node or "-"))
        interval = f"{result.low:.3f} - {result.high:.3f}"
        found = (f"{result.slow_down:.3f}", interval, f"{result.rule:.3f}", f"{result.of_dense:.3f}")
        lines.append((*way, *found, f"{result.memory:.2f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _figures(trace: Trace, checked: Check, results: dict[Case, Result]) -> dict[str, Any]:
    return {
        "windows": len(trace.rows_NL),
        "steps": trace.steps,
        "check": checked._asdict(),
        "cases": [vars(case) | result._asdict() for case, result in results.items()],
    }


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}, expected whole numbers above 0, such as 64,512")
    return [int(part) for part in parts]


def _syncs(text: str) -> list[str]:
    names = text.split(",")
    unknown = set(names) - {"1", "2", "3", "layer"}
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: expected 1, 2, 3 or layer")
    return names
