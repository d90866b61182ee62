"""One GPU beside several of this machine: losses, speed, memory and operations of each way to cut the work.

  megaboat bench scale configs/1b.yaml
  megaboat bench scale --layouts zero1,tensor2 --checkpoint /scratch configs/1b.yaml train.micro_batch=4
  megaboat bench scale --layouts none --row 1048576 --largest --budget 600 configs/1b.yaml

Starts its own ranks (no torchrun), fresh ones for each layout; one that fails says so and the next follows. Rows are
synthetic. With `train.global_batch` rows a step, every layout trains on the same rows as one GPU does, whose losses
stand beside. Speed: tokens a second on two GPUs over twice those of one GPU, which gets half the rows: the same tokens
a GPU. Memory and operations stand beside what `megaboat plan` says of exactly this layout at the measured activation;
the last line says how far it was off at worst. Figures are printed, and written with `--json`, as they come.
"""

import argparse
import bisect
import contextlib
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megaboat.config import build_config, load_config
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput
from megaboat.model.config import SeqBoatConfig
from megaboat.model.memory import Parameters
from megaboat.tools.bench_ranks import Failed, NoRoom, Spares
from megaboat.tools.bench_scale_rank import Measured, device_bytes, measure
from megaboat.tools.bench_scale_table import (
    GB,
    HEADER,
    Case,
    Compared,
    checkpoint_line,
    compare,
    heading,
    line,
    sentence,
    verdict,
)
from megaboat.tools.options import output_file
from megaboat.tools.plan import with_vocabulary
from megaboat.tools.plan_layout import USABLE, Layout, configured_bytes, layout_memory, rank_parameters

LEAST_SECONDS = 15.0  # of a measurement: its ranks need so much to start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="takes precedence over the file")
    parser.add_argument("--layouts", default="all", help="zero1,zero2,zero3,tensor2,sequence2, or none; default: all")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="measured steps of each; default: 5")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FOLDER", help="try checkpoints there, with the first layout"
    )
    parser.add_argument(
        "--row",
        type=int,
        metavar="TOKENS",
        help="train a row of this length on two GPUs (more: parallel.sequence=N), half of it where that does not fit",
    )
    parser.add_argument(
        "--largest", action="store_true", help="search the most layers that train on one GPU and on two"
    )
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="of each measurement; default: 300")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="S", help="of everything; default: no end")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write all figures there")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print."""
    config = with_vocabulary(load_config(RunConfig, arguments.config, arguments.overrides))
    if not isinstance(config.model, SeqBoatConfig):
        raise BadInput(f"bench scale is for model.family seqboat, not {config.model.family}")
    cases = chosen(config, arguments.layouts)
    if arguments.largest and not torch.cuda.is_available():
        raise BadInput("--largest needs GPUs: a CPU's memory has no clear end")
    bench = Bench(arguments.timeout, arguments.budget, arguments.json)
    bench.keep("config", config.model_dump(mode="json"))
    try:
        _layouts(cases, bench, arguments.steps, arguments.checkpoint)
        if arguments.row is not None:
            _long_row(config, arguments.row, bench)
        if arguments.largest:
            _largest_models(config, bench)
    finally:
        bench.close()
    print(f"{verdict(bench.compared)}\ntook {bench.seconds:.0f} s", flush=True)


class Bench:
    """Ranks to measure with, the time that is left, and what was found."""

    def __init__(self, timeout: float, budget: float, json_file: Path | None) -> None:
        self.found: dict[str, Any] = {}
        self.compared: list[Compared] = []
        self.took = 0.0
        """Seconds of the last attempt."""
        self._timeout, self._budget, self._file = timeout, budget, json_file
        self._started = time.monotonic()
        self._spares = Spares(ahead=2)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._started

    def run(self, function: Callable[..., Any], size: int, *arguments: Any, **options: Any) -> Any:
        """`Spares.run` in the time that is left; Failed where that is too little."""
        timeout = min(self._timeout, self._budget - self.seconds)
        if timeout < LEAST_SECONDS:
            raise Failed(f"left out, the --budget of {self._budget:g} s is used up")
        return self._spares.run(function, size, *arguments, timeout=timeout, **options)

    def attempt(self, case: Case, steps: int, **options: Any) -> Compared | Failed:
        """The figures of a case, or why there are none."""
        started = self.seconds
        try:
            compared = compare(case, self.run(measure, case.gpus, case.config, steps, **options))
        except Failed as failure:
            return failure
        self.took = self.seconds - started
        self.compared.append(compared)
        return compared

    def keep(self, name: str, found: Any) -> None:
        """Also in the JSON file, at once."""
        self.found[name] = found
        if self._file is not None:
            self._file.write_text(json.dumps(self.found, indent=1) + "\n")

    def close(self) -> None:
        """End the processes that wait."""
        self._spares.close()


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


def _layouts(cases: list[Case], bench: Bench, steps: int, checkpoint: Path | None) -> None:
    """The table, a line as soon as it is measured."""
    lines: dict[str, tuple[Case, Measured]] = {}
    for case in cases:
        first = case.gpus > 1 and all(other.gpus == 1 for other, _ in lines.values())
        with tempfile.TemporaryDirectory(dir=checkpoint) as scratch:
            disk = Path(scratch) if checkpoint is not None and first else None
            found = bench.attempt(case, steps, noise=case.name == "one", disk=disk)
        bench.keep(case.name, figures(found))
        if isinstance(found, Failed):
            print(f"{case.name:<11}{found}", flush=True)
            continue
        if not lines:
            print(f"{heading(case, found.found)}\n\n{HEADER}")
        print(line(case, found, lines, bench.took), flush=True)
        lines[case.name] = case, found.found
        if found.found.checkpoint is not None:
            print(checkpoint_line(found.found.checkpoint), flush=True)


def figures(found: Compared | Failed) -> dict[str, Any]:
    """For a JSON file."""
    return {"failed": str(found)} if isinstance(found, Failed) else found.figures()


def _long_row(config: RunConfig, length: int, bench: Bench) -> None:
    ranks = max(2, config.parallel.sequence)
    changes = {"data__seq_len": length, "train__checkpoint_activations": True}
    case = Case(f"row of {length}", ranks, varied(config, zero=2, sequence=ranks, micro=1, rows=1, **changes))
    case.config.check_world(ranks)
    found = bench.attempt(case, steps=1, warm_up=1)
    bench.keep(case.name, figures(found))
    said = f"a row of {length:,} tokens, sequence {ranks}, ZeRO-2, recomputed: "
    if isinstance(found, Compared):
        print(f"{said}loss {found.found.losses[-1]:.4f}, {sentence(found, bench.took)}", flush=True)
        return
    print(f"{said}{found} (planned: {configured_bytes(case.config, ranks, 0.5) / GB:.1f} GB)", flush=True)
    if isinstance(found, NoRoom) and length % (2 * ranks) == 0:
        _long_row(config, length // 2, bench)


def _largest_models(config: RunConfig, bench: Bench) -> None:
    try:
        room = USABLE * bench.run(device_bytes, 1)
    except Failed as failure:
        print(f"largest: {failure}", flush=True)
        return
    for gpus in (2, 1):
        if gpus <= torch.cuda.device_count():
            _largest(config, gpus, room, bench)


def _largest(config: RunConfig, gpus: int, room: float, bench: Bench) -> None:
    """Grow the model by layers until it does not fit, from where the plan sees the end."""
    grown = {
        zero: fitting_layers(config, gpus, zero, room) for zero in range(config.parallel.offload == "optimizer", 4)
    }
    zero = 3 if gpus > 1 else max(grown, key=lambda stage: (grown[stage], -stage))
    tried: dict[int, Compared | Failed] = {}

    def fits(layers: int) -> bool:
        case = Case(f"{layers} layers", gpus, with_layers(config, gpus, zero, layers))
        found = tried[layers] = bench.attempt(case, steps=1, warm_up=1, calibrated=False)
        size = rank_parameters(case.config, 1).total / GB
        result = sentence(found, bench.took) if isinstance(found, Compared) else found
        said = f"largest on {gpus} GPU, ZeRO-{zero}, recomputed: {layers} layers, {size:.2f} B parameters: "
        print(f"{said}{result}", flush=True)
        bench.keep(
            f"largest on {gpus}",
            {"zero": zero, "planned_layers": grown[zero], "tried": {n: figures(one) for n, one in tried.items()}},
        )
        if isinstance(found, Failed) and not isinstance(found, NoRoom):
            raise found  # it says nothing about the room
        return isinstance(found, Compared)

    with contextlib.suppress(Failed):
        search(fits, grown[zero])
    fitted = max((layers for layers, found in tried.items() if isinstance(found, Compared)), default=0)
    too_many = min((layers for layers, found in tried.items() if isinstance(found, NoRoom)), default="more")
    print(f"largest on {gpus} GPU: {fitted} layers fit; did not fit: {too_many}; planned: {grown[zero]}", flush=True)


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
        parameters = Parameters(*(a + (layers - 1) * (b - a) for a, b in zip(one, two, strict=True)))
        layout = Layout(gpus, zero, micro_batch=1, checkpointing=True)
        return layout_memory(with_layers(config, gpus, zero, layers), parameters, layout, 0.5).total <= room

    return max(1, bisect.bisect_left(range(1, 1 << 12), True, key=lambda layers: not fits(layers)))


def with_layers(config: RunConfig, gpus: int, zero: int, layers: int) -> RunConfig:
    """The model of another depth, one row a GPU, recomputed."""
    changes = {"model__layers": layers, "train__checkpoint_activations": True}
    return varied(config, zero=zero, micro=1, rows=gpus, **changes)
