"""A run's `trace.jsonl` read back: windows with what each layer activated, and how long ranks took.

Letters: N windows of all steps, L layers, S samples: a rank in a step.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaboat.errors import BadInput, DamagedData


@dataclass(frozen=True)
class Trace:
    """Everything that a simulation draws from."""

    rows_NL: np.ndarray
    pairs_NL: np.ndarray
    domain_N: np.ndarray
    samples_SC: np.ndarray
    """step, windows, rows, pairs, seconds."""
    width: int
    seq_len: int
    predictor_r2: float
    """Of the last step."""

    @property
    def steps(self) -> int:
        return len(np.unique(self.samples_SC[:, 0]))


def read_trace(path: Path) -> Trace:
    """`path` is the file, or the folder of the run. Raises BadInput where there is nothing to read, DamagedData for
    a line that is none; half a line at the end, as a killed run leaves it, is passed over."""
    file = path / "trace.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise BadInput(f"{file}: no such trace; train with balance.trace_every above 0")
    records = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            records.append(json.loads(line))
            _samples(records[-1])
        except (ValueError, KeyError, TypeError):
            raise DamagedData(f"{file}:{number}: not a line of a trace") from None
    if not records:
        raise BadInput(f"{file}: no step was traced yet; lower balance.trace_every")
    last = records[-1]
    rows, pairs = ([row for record in records for row in record[name]] for name in ("rows", "pairs"))
    if len({len(row) for row in rows}) > 1:
        raise BadInput(f"{file}: its steps have different numbers of layers; a trace is of one model")
    return Trace(
        np.array(rows, float),
        np.array(pairs, float),
        np.concatenate([record["domain"] for record in records]),
        np.concatenate([_samples(record) for record in records]),
        last["width"],
        last["seq_len"],
        max(0.0, last["predictor_r2"]),
    )


def _samples(record: dict[str, Any]) -> np.ndarray:
    ranks = record["ranks"]
    rows_R, pairs_R = (np.array(record[name], float).sum(1).reshape(ranks, -1).sum(1) for name in ("rows", "pairs"))
    each = len(record["rows"]) // ranks
    return np.column_stack([np.full(ranks, record["step"]), np.full(ranks, each), rows_R, pairs_R, record["seconds"]])
