"""Dealing windows by cost changes which rank computes what, and nothing else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megaboat.data.batch import IGNORE
from megaboat.engine.ranks import Ranks
from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from megaboat.model.config import SeqBoatConfig
from megaboat.parallel.balance.partition import karmarkar_karp
from tests.distributed import run_on_ranks
from tests.engine.conftest import dataset_folder, tiny_config
from tests.engine.runs import losses, metrics, train_on_rank

__all__ = ["dataset_folder"]

WINDOWS, LENGTH = 12, 24
MODEL = SeqBoatConfig(layers=2, width=16, qk_dim=8, window=4, vocab_size=50)


def global_batch() -> tuple[Tensor, Tensor]:
    """Tokens and targets; from window to window more targets are not scored."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (WINDOWS, LENGTH + 1), generator=generator)
    ragged = torch.rand(WINDOWS, LENGTH, generator=generator) < torch.linspace(0, 0.9, WINDOWS)[:, None]
    return tokens[:, :-1], tokens[:, 1:].masked_fill(ragged, IGNORE)


def gradient(ranks: Ranks, dtype: torch.dtype, deal: str, steps: int) -> Tensor:
    """The mean gradient over ranks as the trainer forms it, or with each rank's own mean loss (`per rank`)."""
    model = build_model(MODEL, seed=0).to(dtype)
    tokens, targets = global_batch()
    mine = np.arange(WINDOWS).reshape(ranks.size, -1)[ranks.rank]
    if deal != "in order":
        mine = karmarkar_karp(np.linspace(1, 3, WINDOWS) ** 2, ranks.size)[ranks.rank]
    count = (targets[mine] if deal == "per rank" else targets).ne(IGNORE).sum()
    scale = 1 / count if deal == "per rank" else ranks.size / count
    for part in np.array_split(mine, steps):
        output = model(tokens[part], Documents.whole(len(part), LENGTH), targets[part])
        (output.nll * scale).backward()
    flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return ranks.sum(flat) / ranks.size


def gradients(ranks: Ranks) -> dict[tuple[torch.dtype, str, int], Tensor]:
    cases = [
        (dtype, deal, steps)
        for dtype in (torch.float32, torch.float64)
        for deal in ("in order", "balanced", "per rank")
        for steps in (1, 3)
    ]
    return {case: gradient(ranks, *case) for case in cases}


@pytest.fixture(scope="module")
def one_process() -> dict[tuple[torch.dtype, str, int], Tensor]:
    return gradients(Ranks(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("size", [2, 4])
def test_the_gradient_is_that_of_one_process(one_process: dict[Any, Tensor], size: int) -> None:
    """To 1e-12 in fp64 and 1e-5 in fp32, with ragged masks; a mean per rank, the usual mistake, is not."""
    for rank in run_on_ranks(gradients, size):
        for (dtype, deal, steps), found in rank.items():
            expected = one_process[dtype, "in order", 1]
            difference = float((found - expected).norm() / expected.norm())
            if deal == "per rank":
                assert difference > 1e-3
            else:
                assert difference < (1e-12 if dtype == torch.float64 else 1e-5), (deal, steps)


def state_of(out: Path) -> dict[str, Any]:
    latest = out / "checkpoints" / (out / "checkpoints" / "latest").read_text().strip()
    return json.loads((latest / "state.json").read_text())["balance"]


def thresholds(out: Path) -> list[float]:
    latest = out / "checkpoints" / (out / "checkpoints" / "latest").read_text().strip()
    with safe_open(latest / "model-00001.safetensors", framework="pt") as file:
        return [file.get_tensor(name).item() for name in sorted(file.keys()) if name.endswith("threshold_M")]


STILL = {
    "optim__lr": 0.0,
    "train__global_batch": 8,
    "train__micro_batch": 1,
    "balance__budget": 0.3,
    "balance__trace_every": 4,
}


def test_plans_and_thresholds_are_the_same_at_any_number_of_ranks(dataset_folder: Path, tmp_path: Path) -> None:
    """Whole, at 1 rank; and at 2 ranks to the middle, then at 4. Weights that stand still leave every decision, and so
    every count, exactly comparable."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run_on_ranks(train_on_rank, 1, tiny_config(dataset_folder, whole, train__steps=16, **STILL))
    for until, size, zero in ((8, 2, 1), (16, 4, 2)):
        config = tiny_config(dataset_folder, moved, train__steps=until, parallel__zero=zero, **STILL)
        assert run_on_ranks(train_on_rank, size, config) == [("done", until)] * size
    assert state_of(moved) == state_of(whole)
    assert thresholds(moved) == thresholds(whole)
    assert np.count_nonzero(thresholds(whole)) == 2
    assert (moved / "data_ledger.jsonl").read_text() == (whole / "data_ledger.jsonl").read_text()
    ratios = [[line["activation_ratio"] for line in metrics(out)] for out in (whole, moved)]
    assert ratios[0] == ratios[1]
    traces = [[json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()] for out in (whole, moved)]
    for alone, together in zip(*traces, strict=True):
        assert sorted(zip(alone["window"], alone["rows"], strict=True)) == sorted(
            zip(together["window"], together["rows"], strict=True)
        )
        assert len(together["seconds"]) == together["ranks"]
    assert any(trace["window"] != sorted(trace["window"]) for trace in traces[1]), "something was dealt otherwise"


def test_resumes_with_the_same_deals(dataset_folder: Path, tmp_path: Path) -> None:
    """On the same ranks a resumed run is bit for bit the undisturbed one: plans made before the checkpoint included."""
    changes = {"train__global_batch": 8, "train__micro_batch": 2, "optim__schedule": "constant", "optim__warmup": 0.0}
    for until in (7, 14):
        config = tiny_config(dataset_folder, tmp_path / "twice", train__steps=until, **changes)
        run_on_ranks(train_on_rank, 2, config)
    run_on_ranks(train_on_rank, 2, tiny_config(dataset_folder, tmp_path / "once", train__steps=14, **changes))
    assert losses(tmp_path / "twice") == losses(tmp_path / "once")
    assert state_of(tmp_path / "twice") == state_of(tmp_path / "once")


def test_figures_of_a_run(dataset_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(dataset_folder, tmp_path / "run", train__steps=12, train__micro_batch=1)
    run_on_ranks(train_on_rank, 2, config)
    lines = metrics(tmp_path / "run")
    for line in lines:
        assert line["balance"]["imbalance_rows"] == line["imbalance"] >= 1
        assert line["balance"]["imbalance_time"] >= 1
        assert ("layers" in line) == (line["step"] % 10 == 1)
    layers = lines[10]["layers"]
    assert set(layers["ratio_domain"]) <= {"lib", "other-x"}
    assert all(len(layers[name]) == 2 for name in ("entropy", "confidence", "span", "threshold", "ratio_p50"))
    assert all(0.5 < value < 1 for value in layers["confidence"])
