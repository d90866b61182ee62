"""What the cells of a study measured, and the groups that the report compares: seeds together, at the best rate."""

import csv
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megaboat.errors import BadInput
from megaboat.model.config import SeqBoatConfig
from megaboat.parallel.balance.figures import rule_of_thumb
from megaboat.parallel.balance.statistics import DEAD, SATURATED
from megaboat.tools.report_data import Run, read_run
from megaboat.tools.study_fit import Interval, mean_interval, settled_step
from megaboat.tools.study_plan import Cell, Combination, Plan, parameters_of
from megaboat.tools.study_run import state_of
from megaboat.tools.study_tune import choose

LAST_SHARE = 0.2  # of the run: figures of training batches are means over it
RANKS, WINDOWS_A_MEETING = (64, 512, 4096), 8


@dataclass(frozen=True)
class Result:
    """A cell that is done."""

    cell: Cell
    run: Run
    parameters: int
    """Outside the embedding."""

    @property
    def bits(self) -> float:
        """Bits per byte on held-out text."""
        last = self.run.last_evaluation
        return last.overall.bits_per_byte if last else math.nan

    @property
    def test_bits(self) -> float:
        """Bits per byte on text that chose nothing; NaN where there is none."""
        return self.run.test.overall.bits_per_byte if self.run.test else math.nan

    @property
    def activation_by_layer(self) -> np.ndarray:
        """On held-out text, by layer; empty for a dense model."""
        last = self.run.last_evaluation
        return np.array(last.overall.activation if last else [])

    @property
    def activation(self) -> float:
        return _mean(self.activation_by_layer)

    @property
    def domains(self) -> dict[str, float]:
        """Mean activation by domain of held-out text."""
        last = self.run.last_evaluation
        return {name: _mean(np.array(score.activation)) for name, score in last.domains.items()} if last else {}

    @property
    def flops_a_token(self) -> float:
        """Realised, forward and backward, over the whole training."""
        return float(np.nanmean(self.run.metrics["flops_per_token"]))

    @property
    def flops(self) -> float:
        """Realised by the whole training."""
        return self.flops_a_token * self.cell.tokens

    @property
    def span_by_layer(self) -> np.ndarray:
        """Tokens back to the oldest key of active tokens, by layer; NaN where a layer was not used."""
        details = self.run.details
        if not len(details.step_D):
            return np.array([])
        used_DL = np.where(details.confidence_DL > 0, details.span_DL, np.nan)
        return _last_mean(used_DL)

    @property
    def span(self) -> float:
        """Mean of the layers that were used."""
        return _mean(self.span_by_layer)

    @property
    def cv(self) -> float:
        """Deviation over mean of one window's cost."""
        series = self.run.details.series.get("cv1", np.array([math.nan]))
        return float(_last_mean(series[:, None])[0])

    @property
    def dead(self) -> int:
        """Layers below 0.5 % on held-out text."""
        return int((self.activation_by_layer < DEAD).sum())

    @property
    def saturated(self) -> int:
        return int((self.activation_by_layer > SATURATED).sum())

    @property
    def settled(self) -> float:
        """Share of the run after which the mean activation stays within 2 points of its end."""
        metrics = self.run.metrics
        if not metrics.activation_SL.shape[1]:
            return math.nan
        step = settled_step(metrics.step, np.nanmean(metrics.activation_SL, axis=1))
        return step / self.cell.config.train.steps if step is not None else math.nan

    @property
    def seconds(self) -> np.ndarray:
        """(S,): of training, at the end of each step. One of more than twice the median (compiling, saving) counts as
        the median, and evaluations are left out."""
        time_S = self.run.metrics["step_time"]
        usual = np.nanmedian(time_S)
        return np.cumsum(np.where(time_S <= 2 * usual, time_S, usual))

    @property
    def speed(self) -> float:
        """Tokens a second, as measured: beside neighbours on the same device."""
        return float(np.nanmedian(self.run.metrics["tokens_per_second"]))


@dataclass(frozen=True)
class Group:
    """The runs of one combination of factors, at the learning rate that was best there: they differ by their seed."""

    levels: dict[str, str]
    results: list[Result]
    rate: float
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return ", ".join(self.levels.values()) or "all runs"

    @property
    def parameters(self) -> int:
        return self.results[0].parameters

    @property
    def layers(self) -> int:
        return len(self.results[0].activation_by_layer)

    def mean(self, figure: Callable[[Result], float]) -> Interval:
        """Over the seeds."""
        return mean_interval([figure(result) for result in self.results])

    def mean_by_layer(self, figure: Callable[[Result], np.ndarray]) -> np.ndarray:
        """Over the seeds, by layer."""
        return _nanmean(np.array([figure(result) for result in self.results]))

    def thirds(self) -> list[float]:
        """Activation of the bottom, middle and top third of the layers."""
        return [_mean(part) for part in np.array_split(self.mean_by_layer(lambda r: r.activation_by_layer), 3)]

    def slow_down(self, ranks: int) -> float:
        """Expected on so many ranks where nobody deals the windows, with 8 windows a rank between meetings."""
        return rule_of_thumb(self.mean(lambda r: r.cv).mean, ranks, WINDOWS_A_MEETING)


@dataclass(frozen=True)
class Findings:
    """Everything the report draws from."""

    plan: Plan
    results: list[Result]
    groups: list[Group]
    notes: list[str]
    done: int
    """Cells, of `wanted`."""
    wanted: int
    """Cells, when the study is complete: fewer than the grid has where the first seed tunes."""

    @property
    def main_axis(self) -> str | None:
        """The first factor: what is drawn from left to right."""
        return self.plan.factors[0] if self.plan.factors else None

    @property
    def is_scaling(self) -> bool:
        """Whether sizes are compared, and not blocks of about one size: then laws are fitted."""
        sizes = {group.parameters for group in self.groups}
        return len(sizes) >= 3 and max(sizes) > 2 * min(sizes)

    def place(self, group: Group) -> float:
        """Where the group stands from left to right: its size, the number that its level is, or its rank."""
        if self.is_scaling:
            return float(group.parameters)
        level = self._level(group)
        try:
            return float(level)
        except ValueError:
            return float([self._level(other) for other in self.groups].index(level))

    @property
    def is_numeric(self) -> bool:
        """Whether the places are numbers with a meaning."""
        levels = [self._level(group) for group in self.groups]
        return self.is_scaling or all(level.replace(".", "", 1).isdigit() for level in levels)

    def _level(self, group: Group) -> str:
        """On the main axis; empty where a study compares nothing, or the group has no such axis."""
        return group.levels.get(self.main_axis or "", "")

    def rates(self, levels: dict[str, str]) -> dict[float, list[Result]]:
        """Of a combination of factors, the runs by learning rate, of the seeds that tried all rates."""
        first = next(its.first for its in self.plan.combinations if its.levels == levels)
        names = {cell.name for cell in first}
        found: dict[float, list[Result]] = {}
        for result in self.results:
            if result.cell.name in names:
                found.setdefault(result.cell.rate, []).append(result)
        return dict(sorted(found.items()))


def read_findings(plan: Plan) -> Findings:
    """From the cells that are done. Raises BadInput where none is."""
    results, notes, states = [], [], {}
    for cell in plan.cells:
        states[cell.name] = state_of(cell)
        if states[cell.name] == "done":
            run = read_run(cell.out)
            notes += [f"{cell.name}: {note}" for note in run.notes]
            vocabulary = run.config["model"]["vocab_size"]
            model = cell.config.model.model_copy(update={"vocab_size": vocabulary})
            size = parameters_of(cell.config.model_copy(update={"model": model}))[1]
            results.append(Result(cell, run, size))
    groups, ready = _groups(plan, results, states)
    if not groups:
        raise BadInput(f"{plan.study.out}: no cell is done yet; `megaboat study run` comes first")
    wanted = sum(len(combination.at_most) for combination in plan.combinations)
    for state, what in (("failed", "failed"), ("begun", "are not finished"), ("missing", "have not begun")):
        names = [cell.name for cell in ready if states[cell.name] == state]
        if names:
            notes.insert(0, f"{len(names)} of {wanted} cells {what}: {', '.join(names)}.")
    if len(ready) < wanted:
        notes.insert(0, f"{wanted - len(ready)} of {wanted} cells wait for the first seed to have tried all rates.")
    done = sum(states[cell.name] == "done" for cell in ready)
    findings = Findings(plan, results, groups, notes, done, wanted)
    if findings.is_numeric:
        findings.groups[:] = sorted(findings.groups, key=findings.place)
    return findings


def write_cells(findings: Findings, file: Path) -> None:
    """One line a cell, as CSV: its levels and every figure. Speed stands last: it alone is another in each run."""
    axes = list(dict.fromkeys(axis for result in findings.results for axis in result.cell.levels))
    figures: dict[str, Callable[[Result], float | str]] = {
        "parameters": lambda r: r.parameters,
        "learning_rate": lambda r: r.cell.rate,
        "tokens": lambda r: r.cell.tokens,
        "bits_per_byte": lambda r: r.bits,
        "test_bits_per_byte": lambda r: r.test_bits,
        "activation": lambda r: r.activation,
        "flops_per_token": lambda r: r.flops_a_token,
        "flops": lambda r: r.flops,
        "span": lambda r: r.span,
        "cv1": lambda r: r.cv,
        "dead_layers": lambda r: r.dead,
        "saturated_layers": lambda r: r.saturated,
        "settled_share": lambda r: r.settled,
        "activation_by_layer": lambda r: " ".join(f"{ratio:.4f}" for ratio in r.activation_by_layer),
        "tokens_per_second": lambda r: round(r.speed),
    }
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*axes, *figures])
        for result in findings.results:
            levels = [result.cell.levels.get(axis, "") for axis in axes]
            writer.writerow([*levels, *(_number(figure(result)) for figure in figures.values())])


def _groups(plan: Plan, results: list[Result], states: Mapping[str, str]) -> tuple[list[Group], list[Cell]]:
    """Each combination at its best rate, and all cells that are to run by what is known now."""
    bits = {name: math.nan for name, state in states.items() if state == "failed"}
    bits |= {result.cell.name: result.bits for result in results}
    groups, ready = [], []
    for combination in plan.combinations:
        group = _at_best_rate(combination, results, bits)
        groups += [group] if group else []
        ready += combination.first
        if group and all(cell.name in bits for cell in combination.first):
            ready += combination.following(group.rate)
    return groups, ready


def _at_best_rate(combination: Combination, results: list[Result], bits: Mapping[str, float]) -> Group | None:
    """None where no run that may choose the rate is done."""
    choice = choose(combination, bits)
    if choice is None:
        return None
    names = {cell.name for cell in (*combination.first, *combination.others) if cell.rate == choice.rate}
    members = [result for result in results if result.cell.name in names]
    if not members:
        return None
    group = Group(combination.levels, members, choice.rate)
    where = f"{group.name}: " if combination.levels else ""
    rates = {cell.rate for cell in combination.first}
    tried = {cell.rate for cell in combination.first if cell.name in bits}
    if tried < rates:
        group.notes.append(
            f"{where}{len(tried)} of {len(rates)} learning rates were tried so far, and may miss the best."
        )
    if choice.side:
        group.notes.append(
            f"{where}the best learning rate, {choice.rate:g}, is the {choice.side} that was tried; a better one may "
            "lie outside, and with it another activation."
        )
    return group


def _number(value: float | str) -> float | str:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def _nanmean(values_WL: np.ndarray) -> np.ndarray:
    """By column; NaN where nothing is known, without a warning."""
    known = np.isfinite(values_WL)
    total = np.where(known, values_WL, 0.0).sum(0)
    count = known.sum(0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _last_mean(values_SL: np.ndarray) -> np.ndarray:
    return _nanmean(values_SL[-max(1, round(LAST_SHARE * len(values_SL))) :])


def is_sparse(group: Group) -> bool:
    """A dense model has no decision to show."""
    return isinstance(group.results[0].cell.config.model, SeqBoatConfig)
