"""Where the time of a training step goes on this GPU: its kernels by what they are for, beside the floor of each.

The step is that of `bench train`: the real engine, forced activation. The floor of a group is the larger of two times:
the operations of its definition at the rate of a large bf16 product, and the bytes that it must read and write at the
rate of a device copy, both measured in the same run. The host's share is what the step takes beyond its kernels.

example:
  megaboat bench profile --family seqboat --length 8192 --ratio 0.25
"""

import argparse
import json
import re
import time
from collections import defaultdict
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megaboat.engine.deepspeed import Engine, connect
from megaboat.engine.ranks import Ranks, this_process
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput
from megaboat.model.config import SeqBoatConfig
from megaboat.model.flops import head_flops, planned_work, unit_flops
from megaboat.tools.bench_check import check
from megaboat.tools.bench_forced import forced
from megaboat.tools.bench_timing import Ceilings, ceilings
from megaboat.tools.bench_train import WARM_UP, Sizes, prepared, step_config, train_step
from megaboat.tools.options import check_least, output_file

# The first pattern that is found in a kernel's name says what it is for.
ATTENTION, PRODUCTS = "windowed attention", "matrix products"
GROUPS = {
    ATTENTION: r"flash|fmha",
    PRODUCTS: r"nvjet|gemm|cutlass|splitK",
    "EMA": r"ema_(fwd|bwd)|pack_resets",
    "configurator, plan, gathers": r"margin_|gather_rows|place_|flag_kernel|[sS]can|index_",
    "join of a layer's paths": r"join_",
    "layer norm": r"norm_(fwd|bwd)",
    "gates, SiLU": r"gate_|parts_|silu",
    "queries and keys": r"rotary_",
    "softmax of the head": r"cross_entropy",
    "gradients of several uses": r"\badd_kernel|CUDAFunctor_add|meet_",
    "gradients of biases": r"column_sum",
    "optimizer": r"FusedOptimizer|LpNorm|multi_tensor",
    "copies and casts": r"copy|Memcpy|Memset|Fill",
}
REST = "everything else"


@dataclass(frozen=True)
class Group:
    """Kernels of one purpose in one step. `floor_ms` is None where none was worked out."""

    name: str
    ms: float
    kernels: int
    floor_ms: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--family", choices=[*Sizes().families], default="seqboat", help="default: %(default)s")
    parser.add_argument("--length", type=int, default=8192, help="tokens a row; default: %(default)s")
    parser.add_argument("--ratio", type=float, default=0.25, help="activation ratio; default: %(default)s")
    parser.add_argument("--micro-batch", type=int, metavar="ROWS", help="default: 65,536 tokens")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the figures and all kernels there")


def run(arguments: argparse.Namespace) -> None:
    """Check, profile, print."""
    if not 0 <= arguments.ratio <= 1:
        raise BadInput(f"--ratio {arguments.ratio:g}: a share of tokens, from 0 to 1")
    check_least(arguments, length=1, micro_batch=1)
    if not torch.cuda.is_available():
        raise BadInput("bench profile needs a CUDA device")
    sizes, ranks = Sizes(), this_process()
    micro_batch = arguments.micro_batch or max(1, sizes.tokens // arguments.length)
    config = step_config(sizes.families[arguments.family], arguments.length, micro_batch, "nothing", sizes)
    ratio = arguments.ratio if isinstance(config.model, SeqBoatConfig) else None
    connect(ranks)
    check(ranks.device, sizes.precision)
    rates = ceilings("cuda", 100.0)
    with prepared(config, ranks) as engine:
        tokens = micro_batch * arguments.length
        with forced(engine.module, tokens, ratio, "random", ranks.device):
            milliseconds, kernels = _profiled(engine, config, ranks)
    dist.destroy_process_group()
    groups = grouped(kernels, floors(config, ratio, rates))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(table(groups, milliseconds))
    if arguments.json is not None:
        figures = {"step_ms": milliseconds, "groups": [asdict(group) for group in groups], "kernels": kernels}
        arguments.json.write_text(json.dumps(figures, indent=1))


def _profiled(engine: Engine, config: RunConfig, ranks: Ranks) -> tuple[float, dict[str, tuple[float, int]]]:
    """Milliseconds of a step that nobody watches, and of a watched one each kernel's milliseconds and calls."""
    for _ in range(WARM_UP):
        train_step(engine, config, ranks)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    train_step(engine, config, ranks)
    torch.cuda.synchronize()
    milliseconds = 1e3 * (time.perf_counter() - begin)
    with profile(activities=[ProfilerActivity.CUDA]) as watch:
        train_step(engine, config, ranks)
        torch.cuda.synchronize()
    spans = [span for span in watch.key_averages() if span.device_type == torch.autograd.DeviceType.CUDA]
    return milliseconds, {span.key: (span.self_device_time_total / 1e3, span.count) for span in spans}


def grouped(kernels: dict[str, tuple[float, int]], floor_ms: dict[str, float]) -> list[Group]:
    """The kernels by purpose, the longest group first."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for kernel, (ms, calls) in kernels.items():
        name = next((name for name, pattern in GROUPS.items() if re.search(pattern, kernel)), REST)
        sums[name][0] += ms
        sums[name][1] += calls
    floor_ms = dict(floor_ms)
    if ATTENTION not in sums and PRODUCTS in floor_ms:  # by its band, attention is products of a library
        floor_ms[PRODUCTS] += floor_ms.get(ATTENTION, 0.0)
    groups = [Group(name, ms, int(calls), floor_ms.get(name)) for name, (ms, calls) in sums.items()]
    return sorted(groups, key=lambda group: -group.ms)


def floors(config: RunConfig, ratio: float | None, rates: Ceilings) -> dict[str, float]:
    """Milliseconds that no implementation of these passes can go below, for a stack without feed-forward."""
    model = config.model
    if not isinstance(model, SeqBoatConfig) or model.ffn_dim or ratio is None:
        return {}
    tokens = config.train.global_batch * config.data.seq_len
    work = planned_work(model, tokens, config.data.seq_len, ratio)
    _, row, pair = unit_flops(model)
    rows, pairs = float(work.rows_LM.sum()), float(work.pairs_LM.sum())
    dense = 2.0 * model.width**2 * model.layers * tokens + head_flops(model, tokens)
    narrow = 2.0 * model.layers * tokens * model.width / rates.copy  # a bf16 tensor of every layer, read or written
    active = 2.0 * rows * (model.value_dim or 0) / rates.copy  # the same of the active rows' values
    share = ratio * narrow  # and of the rows themselves
    return {
        PRODUCTS: 3 * (dense + rows * row) / rates.product,
        ATTENTION: 3 * pairs * pair / rates.product,
        "EMA": 7 * narrow,  # x, y and y before SiLU; dy, that again, x and dx
        "configurator, plan, gathers": 3 * narrow + 3 * share + narrow,
        "join of a layer's paths": 4 * narrow + share + 3 * narrow + 2 * share,
        "layer norm": 2 * narrow + 4 * narrow,
        "gates, SiLU": 8 * active + 5 * active,
        "gradients of several uses": 4 * narrow + 4 * share,
        "gradients of biases": narrow + share + 2 * active,
    }


def table(groups: list[Group], milliseconds: float) -> str:
    """One line a group, the host's share last."""
    busy = sum(group.ms for group in groups)
    whole = max(busy, milliseconds)  # a watched step's kernels may take longer than a step that nobody watches
    lines = [f"{'what':<28}{'ms':>8}{'share':>7}{'kernels':>9}{'floor ms':>10}"]
    for group in groups:
        floor = "" if group.floor_ms is None else f"{group.floor_ms:.1f}"
        lines.append(f"{group.name:<28}{group.ms:>8.1f}{group.ms / whole:>7.1%}{group.kernels:>9}{floor:>10}")
    waiting = whole - busy
    lines.append(f"{'no kernel runs':<28}{waiting:>8.1f}{waiting / whole:>7.1%}")
    lines.append(f"{'the step':<28}{milliseconds:>8.1f}")
    return "\n".join(lines)
