"""The lines that `bench scale` prints: what was measured, beside what `megaboat plan` says of the same layout."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from megaboat.engine.run_config import RunConfig
from megaboat.model.flops import training_flops
from megaboat.tools.bench_scale_rank import WARM_UP, Measured
from megaboat.tools.plan_layout import GPUS, configured_bytes, configured_layout, rank_parameters, step_seconds

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table. The work of `gpus` GPUs is cut by the configuration."""

    name: str
    gpus: int
    config: RunConfig
    base: str | None = None
    """The line of one GPU that has the same tokens a GPU."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """A layout's figures beside the plan's."""

    name: str
    found: Measured
    planned_bytes: float
    planned_flops: float
    planned_seconds: float | None
    """None on a device that the planner does not know."""

    @property
    def bytes_off(self) -> float | None:
        """The plan's share too much; None on a CPU, where memory is not measured."""
        return None if self.found.peak_bytes is None else self.planned_bytes / self.found.peak_bytes - 1

    @property
    def flops_off(self) -> float:
        return self.planned_flops / self.found.flops - 1

    @property
    def seconds_off(self) -> float | None:
        return None if self.planned_seconds is None else self.planned_seconds / self.found.seconds - 1

    def figures(self) -> dict[str, Any]:
        """For a JSON file."""
        names = ("planned_bytes", "planned_flops", "planned_seconds", "bytes_off", "flops_off", "seconds_off")
        return dataclasses.asdict(self.found) | {name: getattr(self, name) for name in names}


def compare(case: Case, found: Measured) -> Compared:
    """The plan is asked at the activation that was measured."""
    activation = found.activation
    planned = configured_bytes(case.config, case.gpus, activation)
    return Compared(case.name, found, planned, planned_flops(case, activation), planned_seconds(case, found))


def verdict(compared: Sequence[Compared]) -> str:
    """How far the plan was off at worst."""
    offs = {
        "memory": [(one.bytes_off, one.name) for one in compared if one.bytes_off is not None],
        "operations": [(one.flops_off, one.name) for one in compared],
        "time": [(one.seconds_off, one.name) for one in compared if one.seconds_off is not None],
    }
    parts = []
    for what, found in offs.items():
        if found:
            off, name = max(found, key=lambda pair: abs(pair[0]))
            parts.append(f"{what} of {len(found)} layouts, at worst {off:+.1%} ({name})")
    return "the plan beside measurement: " + ("; ".join(parts) or "nothing was measured")


def planned_flops(case: Case, activation: float) -> float:
    """Of one step over all ranks, as executed: recomputation, and what tensor ranks compute alike, are in it."""
    train, length = case.config.train, case.config.data.seq_len
    tokens = train.global_batch * length
    to_the_end = train.precision == "bf16" and torch.cuda.is_available()
    again, tensor = train.checkpoint_activations, case.config.parallel.tensor
    return training_flops(case.config.model, tokens, length, activation, again, to_the_end, tensor)


def planned_seconds(case: Case, found: Measured) -> float | None:
    """Of one step at the activation that was measured."""
    gpu = next((gpu for name, gpu in GPUS.items() if name in found.device), None)
    if gpu is None:
        return None
    layout = configured_layout(case.config, case.gpus)
    parameters = rank_parameters(case.config, layout.tensor)
    return sum(step_seconds(case.config, parameters, layout, gpu, found.activation))


HEADER = (
    f"{'':<11}{'GPUs':>5}{'rows':>6}{'micro':>7}{'tokens/s':>11}{'+-':>6}{'plan off':>10}{'of 2 x one':>12}"
    f"{'peak GB':>9}{'planned':>9}{'off':>7}{'TFLOP':>10}{'planned':>10}{'off':>7}"
    f"{'loss apart':>12}{'norm':>9}{'active':>8}{'took, s':>9}"
)


def heading(case: Case, found: Measured) -> str:
    """What is measured."""
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
    return "\n".join(lines)


def line(case: Case, compared: Compared, before: dict[str, tuple[Case, Measured]], took: float) -> str:
    """A line of the table; `took` seconds with the start of the ranks."""
    train, found = case.config.train, compared.found
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
    peak = "" if found.peak_bytes is None else f"{found.peak_bytes / GB:.2f}"
    off = "" if compared.bytes_off is None else f"{compared.bytes_off:+.1%}"
    late = "" if compared.seconds_off is None else f"{compared.seconds_off:+.1%}"
    return (
        f"{case.name:<11}{case.gpus:>5}{train.global_batch:>6}{train.micro_batch:>7}{speed:>11,.0f}"
        f"{found.spread:>6.1%}{late:>10}{relative:>12}{peak:>9}{compared.planned_bytes / GB:>9.2f}{off:>7}"
        f"{found.flops / 1e12:>10.4g}{compared.planned_flops / 1e12:>10.4g}{compared.flops_off:>+7.1%}"
        f"{losses:>12}{norms:>9}{found.activation:>8.3f}{took:>9.0f}"
    )


def sentence(compared: Compared, took: float) -> str:
    """Seconds, memory and operations, measured beside planned, of what stands outside the table."""
    found, planned = compared.found, f"planned {compared.planned_bytes / GB:.2f} GB"
    memory = planned
    if found.peak_bytes is not None:
        memory = f"peak {found.peak_bytes / GB:.2f} GB, {planned} ({compared.bytes_off:+.1%})"
    if found.start_bytes is not None:
        memory += f", {found.start_bytes / GB:.2f} GB at the start"
    flops = f"{found.flops / 1e12:.4g} TFLOP, planned {compared.planned_flops / 1e12:.4g} ({compared.flops_off:+.1%})"
    late = "" if compared.seconds_off is None else f" (the plan {compared.seconds_off:+.1%})"
    return f"{found.seconds:.1f} s a step{late}, {memory}, {flops}; took {took:.0f} s"


def checkpoint_line(found: dict[str, float]) -> str:
    """Seconds and bytes of saving and restoring."""

    def parts(turn: str) -> str:
        laps = {key.removeprefix(f"{turn}: "): found[key] for key in found if key.startswith(f"{turn}: ")}
        return ", ".join(f"{what} {seconds:.2f} s" for what, seconds in laps.items())

    turns = ", ".join(
        f"the {turn} stopped training for {found[f'{turn}_blocked']:.2f} s ({parts(turn)}; a step beside the writing "
        f"took {found[f'{turn}_step_beside']:.2f} s, all was written after {found[f'{turn}_written_after']:.1f} s)"
        for turn in ("first", "second")
    )
    return (
        f"checkpoints of {found['bytes'] / GB:.2f} GB: the longest step while the host's memory was made ready took "
        f"{found['step_beside_preparing']:.2f} s; {turns}; hashing one took {found['verify']:.1f} s, "
        f"restoring it {found['restore']:.1f} s"
    )
