"""How fast is a training step on this GPU, beside a dense Llama of the same size on the same rows.

Whole steps of the real engine: forward, backward, clipping, AdamW. SeqBoat's activation is forced: `random` activates
each token by itself with the given probability, `runs` in stretches of 64 tokens on average. A micro-batch that does
not fit is halved, and where not even one row fits, activations are recomputed, first those that a pass over memory
gives again, then all; the table says so, and what does not fit even then. Every row is measured, none is extrapolated.
Small models are first compared with the equations in fp64 on the same device, in every mode; if one is wrong nothing is
timed.

Modes: exact waits once a layer for the number of active rows; capacity has a fixed number, 5 % above the busiest
layer's, and waits for nothing; full has rows for every token, active or not; graph is capacity with forward and
backward as one CUDA graph; published computes as the published program does, by FFT and padded rows.

examples:
  megaboat bench train --lengths 8192,32768 --json train.json
  megaboat bench train --lengths 2048 --tokens 8192 --ratios 0.25 --patterns random --modes exact,capacity,graph
"""

import argparse
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megaboat.data.config import DataConfig
from megaboat.engine.deepspeed import Engine, connect
from megaboat.engine.ranks import Ranks, this_process
from megaboat.engine.run_config import ParallelConfig, RunConfig, TrainConfig
from megaboat.errors import BadInput, MegaboatError
from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from megaboat.model.config import LlamaConfig, SeqBoatConfig
from megaboat.model.flops import count_work, forward_flops, llama_flops, peak_flops
from megaboat.model.seqboat import SeqBoat
from megaboat.tools.bench_check import check, computed
from megaboat.tools.bench_forced import forced
from megaboat.tools.bench_graph import Captured
from megaboat.tools.bench_published import PUBLISHED
from megaboat.tools.options import check_least, output_file
from megaboat.tools.plan_layout import configured_bytes

WARM_UP = 3  # the first compiles, the next two settle the allocator
MODES = ("exact", "capacity", "full", "graph", "published")
SPARE = 1.05  # rows of a layer over those of the busiest one

RECOMPUTED = ("nothing", "elementwise", "all")

Config = SeqBoatConfig | LlamaConfig
Case = tuple[float | None, str | None, str]
"""Forced activation: the ratio and the pattern (None: the model decides), and the mode."""
Step = Callable[[Engine, RunConfig, Ranks], tuple[float, float | None]]


@dataclass(frozen=True)
class Sizes:
    """What is compared. The defaults are models of 1.02, 1.09 and 1.08 B parameters."""

    families: dict[str, Config] = dataclasses.field(
        default_factory=lambda: {
            "llama": LlamaConfig(family="llama", vocab_size=32_000, layers=18, width=2048, heads=16, ffn_dim=5632),
            "seqboat": SeqBoatConfig(block="paper", vocab_size=32_000, layers=32, width=2048),
            "scaled": SeqBoatConfig(block="scaled", vocab_size=32_000, layers=12, width=2048),
        }
    )
    lengths: tuple[int, ...] = (2_048, 8_192, 32_768, 131_072)
    ratios: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)
    patterns: tuple[str, ...] = ("random", "runs")
    modes: tuple[str, ...] = MODES[:1]
    tokens: int = 65_536
    """Tokens a step; a longer row is a step by itself."""
    steps: int = 5
    precision: str = "bf16"
    zero: int = 0
    recompute: tuple[str, ...] = RECOMPUTED
    """The first of these that fits is taken."""


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    family: str
    length: int
    activation: float | None
    pattern: str | None
    mode: str
    micro_batch: int
    recomputed: str
    """One of RECOMPUTED."""
    tokens_per_second: float = 0.0
    spread: float = 0.0
    """Half the distance between the slowest and the fastest step, over the median."""
    peak_gib: float = 0.0
    mfu: float | None = None
    """Useful work, activated rows only, over the device's peak; None where that is unknown."""
    problem: str = ""
    """Why there are no figures."""
    plan_off: float | None = None
    """By what share `megaboat plan` says more than the peak; None where it was not measured, or rows are fixed."""
    seconds: tuple[float, ...] = ()
    """Of each timed step, in their order."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    names = list(Sizes().families)
    parser.add_argument("--families", default=",".join(names), help=f"default: {','.join(names)}")
    parser.add_argument("--lengths", default="2048,8192,32768,131072", help="tokens a row; default: %(default)s")
    parser.add_argument("--ratios", default="1.0,0.5,0.25,0.125", help="activation ratios; default: %(default)s")
    parser.add_argument("--patterns", default="random,runs", help="of forced activation; default: %(default)s")
    parser.add_argument("--modes", default="exact", help=f"of {', '.join(MODES)}; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=Sizes().tokens, help="a step at least; default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each row; default: %(default)s")
    parser.add_argument("--zero", type=int, default=0, choices=(0, 1, 2), help="DeepSpeed's stage; default: 0")
    parser.add_argument("--recompute", choices=RECOMPUTED, help="default: what fits, nothing first")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write all figures there")


def run(arguments: argparse.Namespace) -> None:
    """Check, time, print."""
    sizes = _sizes(arguments)
    if not torch.cuda.is_available():
        raise BadInput("bench train needs a CUDA device")
    rows = []
    ranks = this_process()
    connect(ranks)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n\n{HEADER}")
    for row in compare(sizes, ranks):
        rows.append(row)
        print(line(row, rows), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    dist.destroy_process_group()
    offs = [row.plan_off for row in rows if row.plan_off is not None]
    print(f"the plan's memory is at worst {max(offs, key=abs, default=0.0):+.1%} off in {len(offs)} rows")


def _sizes(arguments: argparse.Namespace) -> Sizes:
    known, wanted = Sizes().families, arguments.families.split(",")
    if unknown := set(wanted) - set(known):
        raise BadInput(f"--families: no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for option, there in (("patterns", Sizes().patterns), ("modes", MODES)):
        if unknown := set(getattr(arguments, option).split(",")) - set(there):
            raise BadInput(f"--{option}: no {', '.join(sorted(unknown))}; there are {', '.join(there)}")
    if "graph" in arguments.modes and arguments.zero:
        raise BadInput(f"--modes graph does not go with --zero {arguments.zero}, which takes gradients as they come")
    try:
        lengths = tuple(int(text) for text in arguments.lengths.split(","))
        ratios = tuple(float(text) for text in arguments.ratios.split(","))
    except ValueError as error:
        raise BadInput(f"--lengths and --ratios take numbers with commas between: {error}") from None
    if outside := [ratio for ratio in ratios if not 0 <= ratio <= 1]:
        raise BadInput(f"--ratios {outside[0]:g}: a share of tokens, from 0 to 1")
    if min(lengths) < 1:
        raise BadInput(f"--lengths {min(lengths)}: at least 1")
    check_least(arguments, tokens=1, steps=1)
    return Sizes(
        families={name: known[name] for name in known if name in wanted},
        lengths=lengths,
        ratios=ratios,
        patterns=tuple(arguments.patterns.split(",")),
        modes=tuple(arguments.modes.split(",")),
        tokens=arguments.tokens,
        steps=arguments.steps,
        zero=arguments.zero,
        recompute=(arguments.recompute,) if arguments.recompute else RECOMPUTED,
    )


HEADER = (
    f"{'model':<9}{'tokens a row':>13}{'active':>8}{'pattern':>9}{'mode':>10}{'rows':>6}{'recomputed':>13}"
    f"{'tokens/s':>11}{'+-':>6}{'x Llama':>9}{'peak GiB':>9}{'plan off':>10}{'MFU':>7}"
)


def line(row: Row, before: Sequence[Row]) -> str:
    """The row as text; its speed over Llama's at the same length where `before` has that."""
    peers = [other for other in before if (other.family, other.length, other.problem) == ("llama", row.length, "")]
    ratio = f"{row.tokens_per_second / peers[0].tokens_per_second:.2f}" if peers else ""
    active = "" if row.activation is None else f"{row.activation:.3f}"
    off = "" if row.plan_off is None else f"{row.plan_off:+.1%}"
    mfu = "n/a" if row.mfu is None else f"{row.mfu:.1%}"
    said = f"{row.family:<9}{row.length:>13,}{active:>8}{row.pattern or '':>9}{row.mode:>10}{row.micro_batch:>6}"
    if row.problem:
        return f"{said}  {row.problem}"
    return (
        f"{said}{row.recomputed:>13}{row.tokens_per_second:>11,.0f}{row.spread:>6.1%}{ratio:>9}"
        f"{row.peak_gib:>9.1f}{off:>10}{mfu:>7}"
    )


def compare(sizes: Sizes, ranks: Ranks) -> Iterator[Row]:
    """The rows as they are measured. Raises MegaboatError when the model is wrong on this device."""
    check(ranks.device, sizes.precision)
    for length in sizes.lengths:
        for name, model in sizes.families.items():
            yield from _family(name, model, length, sizes, ranks)


def _family(name: str, model: Config, length: int, sizes: Sizes, ranks: Ranks) -> Iterator[Row]:
    """All activations of one model at one length, each with the largest micro-batch that fits."""
    cases: list[Case] = [(None, None, "exact")] if isinstance(model, LlamaConfig) else [
        (ratio, pattern, mode)
        for ratio in sorted(sizes.ratios)  # least memory first: it gets the largest micro-batch
        for pattern in (sizes.patterns if ratio < 1 else sizes.patterns[:1])
        for mode in sizes.modes
    ]  # fmt: skip
    rows = max(1, sizes.tokens // length)
    micro_batches = [rows >> i for i in range(rows.bit_length())]
    ways = [way for way in sizes.recompute if way != "elementwise" or isinstance(model, SeqBoatConfig)] or ["nothing"]
    attempts = [(micro, way) for way in ways for micro in micro_batches]
    for micro_batch, recomputed in attempts:
        config = step_config(model, length, micro_batch, recomputed, sizes)
        with suppress(torch.OutOfMemoryError):
            for row in _rows(name, config, list(cases), sizes.steps, ranks):
                cases.pop(0)
                yield row
        _free()
        if not cases:
            return
    for case in cases:
        yield Row(name, length, *case, 1, ways[-1], problem=f"does not fit, even one row with {ways[-1]} recomputed")


def _rows(name: str, config: RunConfig, cases: Sequence[Case], steps: int, ranks: Ranks) -> Iterator[Row]:
    with prepared(config, ranks) as engine:
        for case in cases:
            yield measure(name, engine, config, case, steps, ranks)


def step_config(model: Config, length: int, micro_batch: int, recomputed: str, sizes: Sizes) -> RunConfig:
    """A step of `sizes.tokens`, or of one row where that is longer."""
    train = TrainConfig(
        global_batch=max(1, sizes.tokens // length),
        micro_batch=micro_batch,
        precision=sizes.precision,
        checkpoint_activations=recomputed == "all",
        recompute_elementwise=recomputed == "elementwise",
    )
    return RunConfig(
        model=model, data=DataConfig(seq_len=length), train=train, parallel=ParallelConfig(zero=sizes.zero)
    )


@contextmanager
def prepared(config: RunConfig, ranks: Ranks) -> Iterator[Engine]:
    """The engine with a new model on the device; afterwards both are let go."""
    with ranks.device:
        model = build_model(config.model, 0)
    model.checkpoint_activations = config.train.checkpoint_activations
    if isinstance(model, SeqBoat):
        model.recompute_elementwise = config.train.recompute_elementwise
    elif ranks.device.type == "cuda":
        model.compile_layers()
    engine = Engine(model, config, ranks)
    try:
        engine.train()
        yield engine
    finally:
        engine.close()


def measure(name: str, engine: Engine, config: RunConfig, case: Case, steps: int, ranks: Ranks) -> Row:
    """Time whole steps."""
    ratio, pattern, mode = case
    rows, length, micro_batch = config.train.global_batch, config.data.seq_len, config.train.micro_batch
    what = (name, length, ratio, pattern, mode, micro_batch, _recomputed(config))
    way = computed(PUBLISHED if mode == "published" else {})
    with way, forced(engine.module, micro_batch * length, ratio, pattern, ranks.device) as busiest:
        if isinstance(engine.module, SeqBoat):
            share = 1.0 if mode == "full" else min(1.0, SPARE * busiest)
            engine.module.capacity = None if mode in ("exact", "published") else share
        step: Step = train_step
        if mode == "graph":
            try:
                step = _graphed(engine, config, case, ranks)
            except (torch.OutOfMemoryError, MegaboatError):
                raise
            except Exception as error:  # whatever a kernel's library raises
                return Row(*what, problem=f"not captured: {str(error).strip().splitlines()[0]:.200}")
        seconds, flops, activation = _timed(engine, config, ranks, steps, step)
    median = statistics.median(seconds)
    peak, held = peak_flops(ranks.device), torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else 0
    return Row(
        name,
        length,
        activation,
        pattern,
        mode,
        micro_batch,
        _recomputed(config),
        rows * length / median,
        (max(seconds) - min(seconds)) / 2 / median,
        held / 2**30,
        flops / median / peak if peak else None,
        plan_off=configured_bytes(config, 1, activation or 0.0) / held - 1 if held and mode == "exact" else None,
        seconds=tuple(seconds),
    )


def _recomputed(config: RunConfig) -> str:
    if config.train.checkpoint_activations:
        return "all"
    return "elementwise" if config.train.recompute_elementwise else "nothing"


def _graphed(engine: Engine, config: RunConfig, case: Case, ranks: Ranks) -> Step:
    """`train_step` with forward and backward captured, after a look at what the graph computes."""
    rows, micro_batch, length = config.train.global_batch, config.train.micro_batch, config.data.seq_len
    assert isinstance(engine.module, SeqBoat)
    useful = train_step(engine, config, ranks)  # decisions are forced: it is the same in every step
    _forget_peak(ranks.device)  # not after the warm-up: a graph takes its memory once
    docs = Documents.whole(micro_batch, length, ranks.device)
    graph = Captured(engine.module, docs, 1 / (rows * length), config.train.precision == "bf16")
    with forced(graph.module, micro_batch * length, *case[:2], ranks.device):
        graph.capture()

    def step(engine: Engine, config: RunConfig, ranks: Ranks) -> tuple[float, float | None]:
        graph.begin()
        for i in range(rows // micro_batch):
            if i:
                engine.next_micro_batch()
            graph(torch.randint(config.model.vocab_size or 0, (micro_batch, length + 1), device=ranks.device))
        engine.step(1e-6)
        return useful

    return step


def _timed(
    engine: Engine, config: RunConfig, ranks: Ranks, steps: int, step: Step
) -> tuple[list[float], float, float | None]:
    """Seconds of each step, and the operations and activation of the last."""
    for _ in range(WARM_UP):
        flops, activation = step(engine, config, ranks)
    if step is train_step:
        _forget_peak(ranks.device)
    seconds = []
    _finish(ranks.device)  # Llama's steps end without a wait: the first would be charged for the warm-up's last
    for _ in range(steps):
        begin = time.perf_counter()
        flops, activation = step(engine, config, ranks)
        _finish(ranks.device)
        seconds.append(time.perf_counter() - begin)
    return seconds, flops, activation


def train_step(engine: Engine, config: RunConfig, ranks: Ranks) -> tuple[float, float | None]:
    """One optimizer step on random tokens. Returns its useful operations and the mean activation."""
    rows, micro_batch, length = config.train.global_batch, config.train.micro_batch, config.data.seq_len
    docs = Documents.whole(micro_batch, length, ranks.device)
    works, ratios = [], []
    for i in range(rows // micro_batch):
        if i:
            engine.next_micro_batch()
        tokens_BT = torch.randint(config.model.vocab_size or 0, (micro_batch, length + 1), device=ranks.device)
        output = engine(tokens_BT[:, :-1], docs, tokens_BT[:, 1:].contiguous())
        engine.backward(output.nll / (rows * length))
        if isinstance(config.model, SeqBoatConfig):
            active_LXM = torch.stack([routing.active_XM for routing in output.routings])
            works.append(count_work(active_LXM, docs.cu_seqlens, config.model.window))
            ratios.append(active_LXM.float().mean())
    engine.step(1e-6)
    # Numbers reach the host only now: before, they would hold up the launches of the optimizer's step.
    if isinstance(config.model, LlamaConfig):
        return 3 * llama_flops(config.model, rows * length, length), None
    flops = sum(3 * forward_flops(config.model, micro_batch * length, work) for work in works)
    return flops, float(torch.stack(ratios).mean())


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
