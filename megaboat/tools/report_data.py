"""What a run folder says about the run, read leniently: a killed run leaves half a line, a short one no evaluation."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megaboat.errors import BadInput
from megaboat.tools.report_balance import Details, build_details

BASELINES = ("unigram", "bigram", "zlib")
SERIES = ("loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_time", "flops_per_token", "mfu", "imbalance")


@dataclass(frozen=True)
class Metrics:
    """Training, a row a step in increasing order; NaN where a step does not say."""

    step: np.ndarray  # (S,)
    series: dict[str, np.ndarray]  # each of SERIES, (S,)
    activation_SL: np.ndarray  # L = 0: the model has no configurator

    def __getitem__(self, name: str) -> np.ndarray:
        return self.series[name]

    def known(self, name: str) -> bool:
        """Whether any step says it."""
        return bool(np.isfinite(self.series[name]).any())


@dataclass(frozen=True)
class Score:
    """How well the model predicts one text."""

    bits_per_byte: float
    nll: float
    perplexity: float
    bytes: int
    activation: list[float]  # per layer; empty without configurator


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on one split."""

    step: int
    split: str
    overall: Score
    domains: dict[str, Score]


@dataclass(frozen=True)
class Run:
    """Everything the report draws from."""

    folder: Path
    metrics: Metrics
    evaluations: list[Evaluation]  # of text that may have chosen something, in order of step
    baselines: dict[str, dict[str, float]]  # of BASELINES those that there are: domain or "overall" -> bits per byte
    config: dict[str, Any]
    outcome: dict[str, Any]
    details: Details = field(default_factory=Details)
    notes: list[str] = field(default_factory=list)  # what was missing or damaged, in sentences
    test: Evaluation | None = None  # of the text that chose nothing

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def last_evaluation(self) -> Evaluation | None:
        return self.evaluations[-1] if self.evaluations else None

    @property
    def is_sparse(self) -> bool:
        """Whether there is a decision to show; a llama run has none."""
        last = self.last_evaluation
        return self.metrics.activation_SL.shape[1] > 0 or (last is not None and bool(last.overall.activation))


def read_run(folder: Path) -> Run:
    """Raises BadInput where there is no run, or one that has not finished a step."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such run folder")
    notes: list[str] = []
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise BadInput(f"{folder}: no metrics.jsonl, so this is not a run folder, or the run has not begun to train")
    lines = _read_lines(file, notes)
    metrics = build_metrics(lines)
    if not len(metrics.step):
        raise BadInput(f"{file}: not one finished step; train first")
    missing = int(metrics.step[-1] - metrics.step[0]) + 1 - len(metrics.step)
    if missing:
        notes.append(
            f"{missing:,} of the steps up to {metrics.step[-1]:,} are not in metrics.jsonl; pictures have gaps."
        )
    found = build_evaluations(_read_lines(folder / "evaluation.jsonl", notes))
    return Run(
        folder=folder,
        metrics=metrics,
        evaluations=[evaluation for evaluation in found if evaluation.split != "test"],
        test=next((evaluation for evaluation in reversed(found) if evaluation.split == "test"), None),
        baselines=_baselines(_read_object(folder / "baselines.json", notes)),
        config=_read_object(folder / "config.yaml", notes),
        outcome=_read_object(folder / "outcome.json", notes),
        details=build_details(lines),
        notes=notes,
    )


def build_metrics(rows: list[dict[str, Any]]) -> Metrics:
    """Columns from rows. A step that is there twice was done again after a resume: the last one counts."""
    by_step = {int(row["step"]): row for row in rows if _number(row.get("step")) == _number(row.get("step"))}
    steps = sorted(by_step)
    kept = [by_step[step] for step in steps]
    series = {name: np.array([_number(row.get(name)) for row in kept], dtype=float) for name in SERIES}
    ratios = [_ratios(row.get("activation_ratio")) for row in kept]
    activation_SL = np.full((len(kept), max(map(len, ratios), default=0)), np.nan)
    for row, ratio in zip(activation_SL, ratios, strict=True):
        row[: len(ratio)] = ratio
    return Metrics(np.array(steps, dtype=int), series, activation_SL)


def build_evaluations(rows: list[dict[str, Any]]) -> list[Evaluation]:
    """In order of step; of two at the same step and split the last one counts, one without `overall` does not."""
    found = {}
    for row in rows:
        domains, overall = row.get("domains"), row.get("overall")
        if not isinstance(overall, dict) or math.isnan(_number(row.get("step"))):
            continue
        scores = (
            {str(k): _score(v) for k, v in domains.items() if isinstance(v, dict)} if isinstance(domains, dict) else {}
        )
        evaluation = Evaluation(int(row["step"]), str(row.get("split", "held-out")), _score(overall), scores)
        found[evaluation.step, evaluation.split] = evaluation
    return [found[key] for key in sorted(found)]


def _score(record: dict[str, Any]) -> Score:
    number = {name: _number(record.get(name)) for name in ("bits_per_byte", "nll", "perplexity", "bytes")}
    size = 0 if math.isnan(number["bytes"]) else int(number["bytes"])
    ratios = _ratios(record.get("activation_ratio"))
    return Score(number["bits_per_byte"], number["nll"], number["perplexity"], size, ratios)


def _baselines(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {name: record[name] for name in BASELINES if isinstance(record.get(name), dict)}
    return {name: {str(k): _number(v) for k, v in scores.items()} for name, scores in found.items()}


def _ratios(value: Any) -> list[float]:
    return [_number(item) for item in value] if isinstance(value, list) else []


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _read_lines(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    rows, damaged = [], 0
    lines = [line for line in file.read_bytes().split(b"\n") if line.strip(b"\0 \r\t")]
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        damaged += not isinstance(row, dict)
        if isinstance(row, dict):
            rows.append(row)
    if damaged:
        whole = f"{damaged} of {len(lines):,} lines of {file.name} {'is' if damaged == 1 else 'are'} damaged"
        notes.append(f"{whole}, as a run that is stopped while it writes leaves them; skipped.")
    return rows


def _read_object(file: Path, notes: list[str]) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError):
        value = None
    if not isinstance(value, dict):
        notes.append(f"{file.name} cannot be read.")
        return {}
    return value
