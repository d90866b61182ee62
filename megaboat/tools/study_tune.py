"""Learning rates: which was best for a combination of factors, and which cells of the other seeds follow from it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megaboat.errors import BadInput
from megaboat.tools.report_data import read_run
from megaboat.tools.study_plan import Cell, Combination, Plan
from megaboat.tools.study_run import state_of


@dataclass(frozen=True)
class Choice:
    """Of a learning rate."""

    rate: float
    bits: float
    """Per byte of held-out text at that rate, mean of the seeds that tried it; NaN where none was evaluated."""
    side: str
    """`smallest` or `largest` where it lies at the border of the rates that were tried, else empty."""


def choose(combination: Combination, bits: Mapping[str, float]) -> Choice | None:
    """Of the rates that as many seeds have as any other, the one with the fewest bits per byte.

    bits: of the cells that have ended, by name; NaN of those that failed. None where none has ended.
    """
    tried: dict[float, list[float]] = {}
    for cell in combination.first:
        if cell.name in bits:
            tried.setdefault(cell.rate, []).append(bits[cell.name])
    if not tried:
        return None
    known = {rate: [value for value in values if math.isfinite(value)] for rate, values in tried.items()}
    seeds = max(map(len, known.values()))
    means = {
        rate: float(np.mean(values)) if values else math.nan for rate, values in known.items() if len(values) == seeds
    }
    best = min(means, key=lambda rate: (math.isnan(means[rate]), means[rate]))
    sides = {min(tried): "smallest", max(tried): "largest"} if len(tried) > 1 else {}
    return Choice(best, means[best], sides.get(best, ""))


def settled(combination: Combination) -> Choice | None:
    """The choice once all rates were tried, read from the run folders, so that it is the same each time; None before,
    and where all of them failed."""
    states = {cell.name: state_of(cell) for cell in combination.first}
    if not set(states.values()) <= {"done", "failed"} or "done" not in states.values():
        return None
    done = [cell for cell in combination.first if states[cell.name] == "done"]
    return choose(combination, dict.fromkeys(states, math.nan) | {cell.name: _held_out_bits(cell) for cell in done})


def following(combination: Combination) -> list[Cell]:
    """Cells of the other seeds, as soon as their learning rate is known.

    Raises BadInput where the runs have no held-out text to choose it by.
    """
    choice = settled(combination) if combination.others else None
    if choice and math.isnan(choice.bits):
        raise BadInput(
            f"{combination.first[0].out}: no held-out text was evaluated, so no learning rate can be chosen; prepare "
            "the corpus with --val FILE"
        )
    return combination.following(choice.rate) if choice else []


def ready(plan: Plan) -> list[Cell]:
    """All cells that are to run by what is known now, whatever their state."""
    return [cell for combination in plan.combinations for cell in (*combination.first, *following(combination))]


def borders(plan: Plan) -> list[str]:
    """Combinations whose best learning rate is the smallest or largest that was tried, in words."""
    found = [(combination, settled(combination)) for combination in plan.combinations]
    return [
        f"{', '.join(combination.levels.values()) or 'all'} ({choice.rate:g}, the {choice.side})"
        for combination, choice in found
        if choice and choice.side and math.isfinite(choice.bits)
    ]


def _held_out_bits(cell: Cell) -> float:
    last = read_run(cell.out).last_evaluation
    return last.overall.bits_per_byte if last else math.nan
