"""Measure beside a named peer: `bench data` the way from shards to batches, `bench kernels` the kernels of this GPU,
`bench train` whole steps, `bench profile` where their time goes, `bench scale` them on several GPUs, `bench balance`
how evenly ranks work, `bench decode` generation at long context.
"""

import argparse

from megaboat.tools import (
    bench_balance,
    bench_data,
    bench_decode,
    bench_kernels,
    bench_profile,
    bench_scale,
    bench_train,
)

BENCHES = {
    "balance": bench_balance,
    "data": bench_data,
    "kernels": bench_kernels,
    "train": bench_train,
    "profile": bench_profile,
    "scale": bench_scale,
    "decode": bench_decode,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    for name, module in BENCHES.items():
        about = module.__doc__ or ""
        parser = commands.add_parser(
            name,
            help=about.splitlines()[0],
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int | None:
    return BENCHES[arguments.bench].run(arguments)
