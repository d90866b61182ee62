"""A study: one configuration, the grids laid over it, the cells that come of them, and what they will cost."""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from megaboat.config import Section, key_and_value, load_config
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput
from megaboat.model.build import count_parameters
from megaboat.model.config import SeqBoatConfig
from megaboat.model.flops import training_flops
from megaboat.tools.plan import with_vocabulary
from megaboat.tools.plan_layout import GPUS, Layout, layout_memory, rank_parameters, step_seconds

RESOLVED, BASE = "study.yaml", "base.yaml"
SEED_KEYS, RATE_KEY = {"train.seed", "data.seed"}, "optim.lr"
ASSUMED_ACTIVATION, FIXED_ACTIVATION = 0.5, {"always": 1.0, "never": 0.0}

Changes = dict[str, Any]
"""`section.key` to value."""


class Study(Section):
    """A study, as its YAML file says it."""

    question: str
    """What the study is to answer, in a sentence or two: it stands on top of the report."""
    base: Path
    """The configuration that every cell starts from; relative to the study's file."""
    out: Path
    """Folder of the study: a run folder for each cell in `cells/`, the report in `report/`."""
    set: Changes = {}
    """`section.key: value`, for all cells."""
    grids: list[dict[str, list[Any] | dict[str, Changes]]] = pydantic.Field(min_length=1)
    """Each a grid of axes, of which all combinations are run. An axis is a key with its values, `optim.lr: [1e-3,
    2e-3]`, or a name with named levels that set any keys, `size: {1m: {model.width: 64}}`."""
    tune: Literal["all_seeds", "first_seed"] = "all_seeds"
    """Who tries the learning rates: all seeds; or the first, and the others run at the best of its rates alone, which
    each combination of the other axes has for itself."""
    drop_checkpoints: bool = False
    """Delete the checkpoints of a cell that is done: a large grid would fill the disk."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    name: str
    """The run folder's, by what differs."""
    levels: dict[str, str]
    """The cell's level on each axis, in the order of the file."""
    changes: tuple[str, ...]
    """`section.key=value`, for `megaboat train`."""
    config: RunConfig

    @property
    def out(self) -> Path:
        return self.config.train.out

    @property
    def rate(self) -> float:
        return self.config.optim.lr

    @property
    def tokens(self) -> int:
        """That the whole cell trains on."""
        return self.config.train.steps * self.config.train.global_batch * self.config.data.seq_len


@dataclass(frozen=True)
class Combination:
    """The cells of one combination of factors: they differ by seed and learning rate."""

    levels: dict[str, str]
    first: list[Cell]
    """Those that depend on no result: all of them, or all rates of the seed that tunes."""
    others: list[Cell]
    """All rates of the other seeds, of which one will be run."""

    def following(self, rate: float) -> list[Cell]:
        """The cells of the other seeds at the rate that was chosen."""
        return [cell for cell in self.others if cell.rate == rate]

    @property
    def at_most(self) -> list[Cell]:
        """As many cells as will run, whichever rate is chosen."""
        by_rate = [self.following(rate) for rate in dict.fromkeys(cell.rate for cell in self.first)]
        return [*self.first, *max(by_rate, key=len)]


@dataclass(frozen=True)
class Plan:
    """A study with its cells."""

    study: Study
    cells: list[Cell]
    seed_axes: frozenset[str]
    rate_axis: str | None

    @property
    def factors(self) -> list[str]:
        """The axes that are neither seed nor learning rate: what the study compares."""
        axes = dict.fromkeys(axis for cell in self.cells for axis in cell.levels)
        return [axis for axis in axes if axis not in self.seed_axes and axis != self.rate_axis]

    @property
    def combinations(self) -> list[Combination]:
        """Of the factors, in the order of the file; the first seed of each is that of its first cell."""
        by_levels: dict[tuple[tuple[str, str], ...], list[Cell]] = {}
        for cell in self.cells:
            levels = ((axis, cell.levels[axis]) for axis in self.factors if axis in cell.levels)
            by_levels.setdefault(tuple(levels), []).append(cell)
        return [self._combination(dict(levels), cells) for levels, cells in by_levels.items()]

    def _combination(self, levels: dict[str, str], cells: list[Cell]) -> Combination:
        if self.study.tune == "all_seeds":
            return Combination(levels, cells, [])
        seed = self._seed(cells[0])
        split = {its: [cell for cell in cells if (self._seed(cell) == seed) is its] for its in (True, False)}
        return Combination(levels, split[True], split[False])

    def _seed(self, cell: Cell) -> list[str | None]:
        return [cell.levels.get(axis) for axis in sorted(self.seed_axes)]


def read_study(path: Path, out: Path | None = None, changes: list[str] | None = None) -> Plan:
    """The study of a YAML file, or of the folder that `write_study` wrote. `changes` and `out` take precedence.

    Raises BadInput with what is wrong with the file or with one of its cells.
    """
    path = path / RESOLVED if path.is_dir() else path
    study = load_config(Study, path)
    for_all = study.set | dict(key_and_value(override) for override in changes or [])
    study = study.model_copy(update={"base": path.parent / study.base, "out": out or study.out, "set": for_all})
    found: dict[str, Cell] = {}
    for grid in study.grids:
        for cell in _cells(study, grid):
            if found.setdefault(cell.name, cell).changes != cell.changes:
                raise BadInput(f"{path}: two cells are named {cell.name}, and set other keys; name their levels apart")
    keys = _keys_of_axes(study)
    seeds = frozenset(axis for axis, its in keys.items() if its and its <= SEED_KEYS)
    rates = [axis for axis, its in keys.items() if its == {RATE_KEY}]
    if study.tune == "first_seed" and not (seeds and rates):
        lacks = "an axis of seeds, train.seed or data.seed" if rates else f"an axis {RATE_KEY}"
        raise BadInput(f"{path}: tune: first_seed needs {lacks}; add it to the grids, or leave `tune` out")
    return Plan(study, list(found.values()), seeds, rates[0] if rates else None)


def write_study(plan: Plan) -> None:
    """The study and its base into its folder: `study.yaml` there is all that a report or a later run needs."""
    out = plan.study.out
    resolved = plan.study.model_copy(update={"base": Path(BASE)}).model_dump(mode="json")
    base = plan.study.base.read_text()
    out.mkdir(parents=True, exist_ok=True)
    (out / BASE).write_text(base)
    (out / RESOLVED).write_text(yaml.safe_dump(resolved, sort_keys=False))


def check_folders(plan: Plan) -> None:
    """Raises BadInput where a cell's folder holds a run with other settings: it must not be taken for this one."""
    for cell in plan.cells:
        file = cell.out / "config.yaml"
        if not file.is_file():
            continue
        held, wanted = (_flat(config.model_dump(mode="json")) for config in (load_config(RunConfig, file), cell.config))
        vocabulary = "model.vocab_size"
        if wanted.get(vocabulary) is None:
            wanted[vocabulary] = held.get(vocabulary)
        differs = [key for key in held | wanted if held.get(key) != wanted.get(key)]
        if differs:
            key = differs[0]
            raise BadInput(
                f"{cell.out} holds a run with {key} {held.get(key)}, and the study wants {wanted.get(key)}: give the "
                "study another --out, or delete that folder"
            )


def plan_table(plan: Plan, gpu: str) -> str:
    """What the study will take, a line for each combination of factors; learning rates and seeds are counted."""
    device = GPUS[gpu]
    groups = [combination.at_most for combination in plan.combinations]
    names = [", ".join(combination.levels.values()) or "all" for combination in plan.combinations]
    width = max(map(len, (*names, "in all")))
    head = f"{'':<{width}}{'cells':>7}{'M parameters':>14}{'M tokens each':>15}{'PFLOP':>10}"
    lines = [head + f"{'GB at most':>12}{f'{gpu} minutes at best':>22}"]
    total_flops = total_minutes = 0.0
    for name, cells in zip(names, groups, strict=True):
        costs = [cell_cost(cell, device) for cell in cells]
        flops, minutes = sum(cost.flops for cost in costs), sum(cost.seconds for cost in costs) / 60
        total_flops, total_minutes = total_flops + flops, total_minutes + minutes
        lines.append(
            f"{name:<{width}}{len(cells):>7}{costs[0].parameters / 1e6:>14,.2f}{cells[0].tokens / 1e6:>15,.2f}"
            f"{flops / 1e15:>10.4g}{max(cost.memory for cost in costs) / 1e9:>12,.1f}{minutes:>22,.2f}"
        )
    lines.append(
        f"{'in all':<{width}}{sum(map(len, groups)):>7}{'':>29}{total_flops / 1e15:>10.4g}{total_minutes:>34,.2f}"
    )
    lines.append(
        f"FLOPs and minutes at activation {ASSUMED_ACTIVATION:g} where it is learned, memory with every token active; "
        "starting, evaluation and gaps between kernels are left out: a small model takes several times as long."
    )
    if plan.study.tune == "first_seed":
        lines.append("The first seed tries all learning rates; the others run at the best of them.")
    return "\n".join(lines)


@dataclass(frozen=True)
class Cost:
    """Of one cell on one GPU."""

    parameters: int
    flops: float
    seconds: float
    memory: float


def cell_cost(cell: Cell, gpu: Any) -> Cost:
    """By the planner, at an activation of one half where it is learned."""
    config = with_vocabulary(cell.config)
    arm = config.model.configurator if isinstance(config.model, SeqBoatConfig) else ""
    activation = FIXED_ACTIVATION.get(arm, ASSUMED_ACTIVATION)
    parameters = rank_parameters(config, 1)
    layout = Layout(1, config.parallel.zero, config.train.micro_batch, config.train.checkpoint_activations)
    step = sum(step_seconds(config, parameters, layout, gpu, activation))
    flops = training_flops(config.model, cell.tokens, config.data.seq_len, activation)
    memory = layout_memory(config, parameters, layout, 1.0).total
    return Cost(int(parameters.total), flops, step * config.train.steps, memory)


def parameters_of(config: RunConfig) -> tuple[int, int]:
    """All, and those outside the embedding: the size that scaling is said against, since small models are mostly
    embedding."""
    total = count_parameters(config.model)
    return total, total - (config.model.vocab_size or 0) * config.model.width


def _cells(study: Study, grid: Mapping[str, list[Any] | dict[str, Changes]]) -> Iterator[Cell]:
    axes = {_short(axis, grid): list(_levels(axis, levels)) for axis, levels in grid.items()}
    for point in itertools.product(*axes.values()):
        levels = {axis: label for axis, (label, _) in zip(axes, point, strict=True)}
        changes = dict(study.set)
        for _, changed in point:
            changes |= changed
        name = re.sub(r"[^\w.=+-]", "-", "_".join(f"{axis}={level}" for axis, level in levels.items()))
        changes["train.out"] = str(study.out / "cells" / name)
        written = tuple(f"{key}={_one_line(value)}" for key, value in changes.items())
        yield Cell(name, levels, written, load_config(RunConfig, study.base, written))


def _levels(axis: str, levels: list[Any] | dict[str, Changes]) -> Iterator[tuple[str, Changes]]:
    """Label and keys of each level."""
    if isinstance(levels, dict):
        yield from levels.items()
    else:
        yield from ((str(value), {axis: value}) for value in levels)


def _short(axis: str, grid: Mapping[str, Any]) -> str:
    """`lr` for `optim.lr`, where that is clear."""
    last = axis.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in grid) == 1 else axis


def _keys_of_axes(study: Study) -> dict[str, set[str]]:
    keys: dict[str, set[str]] = {}
    for grid in study.grids:
        for axis, levels in grid.items():
            changed = (changes for _, changes in _levels(axis, levels))
            keys.setdefault(_short(axis, grid), set()).update(*changed)
    return keys


def _one_line(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
