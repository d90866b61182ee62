"""One GPU beside several of this machine: losses, speed, memory and operations of each way to cut the work.

  megaboat bench scale configs/1b.yaml
  megaboat bench scale --layouts zero1,tensor2 --checkpoint /scratch configs/1b.yaml train.micro_batch=4
  megaboat bench scale --layouts none --row 1048576 --largest configs/1b.yaml

Starts its own ranks (no torchrun), fresh ones for each layout; one that fails says so and the next follows. Rows are
synthetic. With `train.global_batch` rows a step, every layout trains on the same rows as one GPU does, whose losses
stand beside. Speed: tokens a second on two GPUs over twice those of one GPU, which gets half the rows: the same tokens
a GPU. Memory and operations stand beside what `megaboat plan` says of exactly this layout at the measured activation.
"""

import argparse
import bisect
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megaboat.config import build_config, load_config
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput
from megaboat.model.config import SeqBoatConfig
from megaboat.model.flops import training_flops
from megaboat.model.memory import Parameters
from megaboat.tools.bench_ranks import Failed, Spares
from megaboat.tools.bench_scale_rank import WARM_UP, Measured, device_bytes, measure
from megaboat.tools.plan import with_vocabulary
from megaboat.tools.plan_layout import USABLE, Layout, layout_memory, rank_parameters

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table. The work of `gpus` GPUs is cut by the configuration."""

    name: str
    gpus: int
    config: RunConfig
    base: str | None = None
    """The line of one GPU that has the same tokens a GPU."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="takes precedence over the file")
    parser.add_argument("--layouts", default="all", help="zero1,zero2,zero3,tensor2,sequence2, or none; default: all")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="measured steps of each; default: 5")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FOLDER", help="try checkpoints there, with the first layout"
    )
    parser.add_argument("--row", type=int, metavar="TOKENS", help="train a row of this length on two GPUs")
    parser.add_argument(
        "--largest", action="store_true", help="search the most layers that train on one GPU and on two"
    )
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="of each measurement; default: 300")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print."""
    config = with_vocabulary(load_config(RunConfig, arguments.config, arguments.overrides))
    if not isinstance(config.model, SeqBoatConfig):
        raise BadInput(f"bench scale is for model.family seqboat, not {config.model.family}")
    cases = chosen(config, arguments.layouts)
    if arguments.largest and not torch.cuda.is_available():
        raise BadInput("--largest needs GPUs: a CPU's memory has no clear end")
    figures: dict[str, Any] = {"config": config.model_dump(mode="json")}
    spares = Spares(ahead=2)
    try:
        for name, found in _everything(config, cases, spares, arguments):
            figures[name] = found
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    finally:
        spares.close()


def _everything(
    config: RunConfig, cases: list[Case], spares: Spares, arguments: argparse.Namespace
) -> Iterator[tuple[str, Any]]:
    yield from _measured(cases, spares, arguments)
    if arguments.row is not None:
        yield "row", _long_row(config, arguments.row, spares, arguments.timeout)
    for gpus in (1, 2) if arguments.largest else ():
        room = USABLE * spares.run(device_bytes, 1)
        yield f"largest on {gpus}", _largest(config, gpus, room, spares, arguments.timeout)


def chosen(config: RunConfig, layouts: str) -> list[Case]:
    """The lines of the table. Raises BadInput where one of them could not train."""
    train = config.train
    cases = [Case("one", 1, varied(config, micro=train.micro_batch))]
    for zero in (1, 3):
        half = varied(config, zero=zero, rows=train.global_batch // 2)
        cases.append(Case(f"one, zero{zero}", 1, half))
    for zero in (1, 2, 3):
        base = "one, zero3" if zero == 3 else "one, zero1"
        cases.append(Case(f"zero{zero}", 2, varied(config, zero=zero), base))
    together = {"micro": 2 * train.micro_batch}  # rows that two GPUs put through together: as many tokens a GPU
    cases.append(Case("tensor2", 2, varied(config, tensor=2, **together), "one, zero1"))
    cases.append(Case("sequence2", 2, varied(config, sequence=2, **together), "one, zero1"))
    names = [case.name for case in cases if case.gpus > 1]
    wanted = {"all": names, "none": []}.get(layouts, layouts.split(","))
    if unknown := set(wanted) - set(names):
        raise BadInput(f"--layouts: no {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    kept = [case for case in cases if case.name in wanted]
    bases = {case.base for case in kept}
    kept = [case for case in cases if case.name in bases or (case.name == "one" and kept)] + kept
    for case in kept:
        case.config.check_world(case.gpus)
    return kept


def varied(
    config: RunConfig,
    zero: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    micro: int | None = None,
    rows: int | None = None,
    **changes: Any,
) -> RunConfig:
    """The configuration with another layout; `changes` are `section__key=value`."""
    values = config.model_dump()
    values["parallel"] |= {"zero": zero, "tensor": tensor, "sequence": sequence}
    values["train"] |= {
        "micro_batch": micro or config.train.micro_batch,
        "global_batch": rows or config.train.global_batch,
    }
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    return build_config(RunConfig, values, "bench scale")


def _measured(cases: list[Case], spares: Spares, arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """The figures of each line once it is printed."""
    lines: dict[str, tuple[Case, Measured]] = {}
    for case in cases:
        first = case.gpus > 1 and all(other.gpus == 1 for other, _ in lines.values())
        with tempfile.TemporaryDirectory(dir=arguments.checkpoint) as scratch:
            disk = Path(scratch) if arguments.checkpoint is not None and first else None
            found = attempt(spares, case, arguments.timeout, arguments.steps, noise=case.name == "one", disk=disk)
        if not isinstance(found, Measured):
            print(f"{case.name:<11}{found}", flush=True)
            yield case.name, {"failed": str(found)}
            continue
        print(line(case, found, lines) if lines else f"{heading(case, found)}\n{line(case, found, lines)}", flush=True)
        lines[case.name] = case, found
        if found.checkpoint is not None:
            print(checkpoint_line(found.checkpoint), flush=True)
        yield case.name, dataclasses.asdict(found) | {"planned_bytes": planned_bytes(case, found.activation)}


def _long_row(config: RunConfig, length: int, spares: Spares, timeout: float) -> Any:
    changes = {"data__seq_len": length, "train__checkpoint_activations": True}
    case = Case("row", 2, varied(config, zero=2, sequence=2, micro=1, rows=1, **changes))
    case.config.check_world(2)
    found = attempt(spares, case, timeout, steps=1, warm_up=1)
    said = f"a row of {length:,} tokens, sequence 2, ZeRO-2, recomputed: "
    if not isinstance(found, Measured):
        print(f"{said}{found} (planned: {planned_bytes(case, 0.5) / GB:.1f} GB)", flush=True)
        return {"failed": str(found)}
    planned = planned_bytes(case, found.activation)
    print(f"{said}{found.seconds:.1f} s a step, loss {found.losses[-1]:.4f}, {memory(found, planned)}", flush=True)
    return dataclasses.asdict(found) | {"planned_bytes": planned}


def _largest(config: RunConfig, gpus: int, room: float, spares: Spares, timeout: float) -> dict[str, Any]:
    """Grow the model by layers until it does not fit, from where the plan sees the end."""
    grown = {zero: fitting_layers(config, gpus, zero, room) for zero in (0, 1, 2, 3)}
    zero = 3 if gpus > 1 else max(grown, key=lambda stage: (grown[stage], -stage))
    tried: dict[int, str | None] = {}

    def fits(layers: int) -> bool:
        case = Case("largest", gpus, with_layers(config, gpus, zero, layers))
        found = attempt(spares, case, timeout, steps=1, warm_up=1, calibrated=False)
        size = rank_parameters(case.config, 1).total / GB
        said = f"largest on {gpus} GPU, ZeRO-{zero}, recomputed: {layers} layers, {size:.2f} B parameters: "
        if isinstance(found, Failed):
            print(f"{said}{found}", flush=True)
        else:
            planned = planned_bytes(case, found.activation)
            print(f"{said}{found.seconds:.1f} s a step, {memory(found, planned)}", flush=True)
        tried[layers] = str(found) if isinstance(found, Failed) else None
        return isinstance(found, Measured)

    low, high = search(fits, grown[zero])
    print(f"largest on {gpus} GPU: {low} layers, {high or 'more'} did not fit; planned: {grown[zero]}", flush=True)
    return {"zero": zero, "planned_layers": grown[zero], "layers": low, "too_many": high, "tried": tried}


def search(fits: Callable[[int], bool], start: int, attempts: int = 4) -> tuple[int, int | None]:
    """The largest number that was seen to fit (0: none) and the smallest that was seen not to, beginning at `start`."""
    low, high, number = 0, None, start
    for _ in range(attempts):
        if fits(number):
            low, number = number, -(-number * 27 // 25) if high is None else (number + high) // 2
        else:
            high, number = number, number * 23 // 25 if low == 0 else (low + number) // 2
        if number <= low or (high is not None and number >= high):
            break
    return low, high


def fitting_layers(config: RunConfig, gpus: int, zero: int, room: float) -> int:
    """The most layers that take no more than `room` bytes by the plan."""
    one, two = (vars(rank_parameters(with_layers(config, gpus, zero, layers), 1)).values() for layers in (1, 2))

    def fits(layers: int) -> bool:
        case = Case("", gpus, with_layers(config, gpus, zero, layers))
        parameters = Parameters(*(a + (layers - 1) * (b - a) for a, b in zip(one, two, strict=True)))
        return layout_memory(case.config, parameters, _layout(case), 0.5).total <= room

    return max(1, bisect.bisect_left(range(1, 1 << 12), True, key=lambda layers: not fits(layers)))


def with_layers(config: RunConfig, gpus: int, zero: int, layers: int) -> RunConfig:
    """The model of another depth, one row a GPU, recomputed."""
    changes = {"model__layers": layers, "train__checkpoint_activations": True}
    return varied(config, zero=zero, micro=1, rows=gpus, **changes)


def attempt(spares: Spares, case: Case, timeout: float, steps: int, **options: Any) -> Measured | Failed:
    """The figures, or why there are none."""
    try:
        return spares.run(measure, case.gpus, case.config, steps, timeout=timeout, **options)
    except Failed as failure:
        return failure


def planned_bytes(case: Case, activation: float) -> float:
    """Of one rank, by the planner."""
    layout = _layout(case)
    return layout_memory(case.config, rank_parameters(case.config, layout.tensor), layout, activation).total


def planned_flops(case: Case, activation: float) -> float:
    """Of one step over all ranks, as executed: recomputation, and what tensor ranks compute alike, are in it."""
    train, length = case.config.train, case.config.data.seq_len
    parameters = rank_parameters(case.config, case.config.parallel.tensor)
    tokens = train.global_batch * length
    to_the_end = case.config.parallel.zero == 3 or (train.precision == "bf16" and torch.cuda.is_available())
    flops = training_flops(case.config.model, tokens, length, activation, train.checkpoint_activations, to_the_end)
    return flops * parameters.total * case.config.parallel.tensor / parameters.whole


def _layout(case: Case) -> Layout:
    train, parallel = case.config.train, case.config.parallel
    cuts = parallel.tensor, parallel.sequence
    return Layout(case.gpus, parallel.zero, train.micro_batch, train.checkpoint_activations, *cuts)


HEADER = (
    f"{'':<11}{'GPUs':>5}{'rows':>6}{'micro':>7}{'tokens/s':>11}{'+-':>6}{'of 2 x one':>12}"
    f"{'peak GB':>9}{'planned':>9}{'off':>7}{'TFLOP':>10}{'planned':>10}{'off':>7}"
    f"{'loss apart':>12}{'norm':>9}{'active':>8}"
)


def heading(case: Case, found: Measured) -> str:
    """What is measured, and the columns' names."""
    train, size = case.config.train, rank_parameters(case.config, 1).total
    again = "recomputed" if train.checkpoint_activations else "nothing recomputed"
    lines = [
        f"{found.device}, torch {torch.__version__}, {size / 1e6:,.0f} M parameters, {train.precision}, {again}, "
        f"{train.global_batch} rows of {case.config.data.seq_len:,} tokens a step",
        f"losses: {' '.join(f'{loss:.4f}' for loss in found.losses)}",
    ]
    if found.noise is not None:
        lines.append(f"{train.precision} and fp32 are {found.noise:.1e} nats a token apart in the first row")
    lines.append(f"apart: from one GPU, nats in the worst of {len(found.losses)} steps; the norm's share in {WARM_UP}")
    return "\n".join([*lines, "", HEADER])


def line(case: Case, found: Measured, before: dict[str, tuple[Case, Measured]]) -> str:
    """A line of the table."""
    train = case.config.train
    speed = train.global_batch * case.config.data.seq_len / found.seconds
    relative = losses = norms = ""
    if case.base in before:
        other, base = before[case.base]
        one = other.config.train.global_batch * other.config.data.seq_len / base.seconds
        relative = f"{speed / (case.gpus * one):.1%}"
    if "one" in before and train.global_batch == before["one"][0].config.train.global_batch:
        one_gpu = before["one"][1]
        losses = f"{max(abs(a - b) for a, b in zip(found.losses, one_gpu.losses, strict=True)):.1e}"
        norms = f"{max(abs(a / b - 1) for a, b in zip(found.norms, one_gpu.norms, strict=True)):.1e}"
    planned, flops = planned_bytes(case, found.activation), planned_flops(case, found.activation)
    peak = "" if found.peak_bytes is None else f"{found.peak_bytes / GB:.2f}"
    off = "" if found.peak_bytes is None else f"{planned / found.peak_bytes - 1:+.1%}"
    return (
        f"{case.name:<11}{case.gpus:>5}{train.global_batch:>6}{train.micro_batch:>7}{speed:>11,.0f}"
        f"{found.spread:>6.1%}{relative:>12}{peak:>9}{planned / GB:>9.2f}{off:>7}{found.flops / 1e12:>10.4g}"
        f"{flops / 1e12:>10.4g}{flops / found.flops - 1:>+7.1%}{losses:>12}{norms:>9}{found.activation:>8.3f}"
    )


def memory(found: Measured, planned: float) -> str:
    """Measured beside planned."""
    if found.peak_bytes is None:
        return f"planned {planned / GB:.2f} GB"
    return f"peak {found.peak_bytes / GB:.2f} GB, planned {planned / GB:.2f} GB ({planned / found.peak_bytes - 1:+.1%})"


def checkpoint_line(found: dict[str, float]) -> str:
    """Seconds and bytes of saving and restoring."""
    turns = ", ".join(
        f"the {turn} stopped training for {found[f'{turn}_blocked']:.2f} s (a step beside the writing took "
        f"{found[f'{turn}_step_beside']:.2f} s, all was written after {found[f'{turn}_written_after']:.1f} s)"
        for turn in ("first", "second")
    )
    return (
        f"checkpoints of {found['bytes'] / GB:.2f} GB: {turns}; hashing one took {found['verify']:.1f} s, "
        f"restoring it {found['restore']:.1f} s"
    )
