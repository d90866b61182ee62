"""The command that measures what dealing by cost gains."""

import json
from pathlib import Path

import pytest

from tests.distributed import run_on_ranks, start_commands
from tests.engine.conftest import dataset_folder, tiny_config
from tests.engine.runs import train_on_rank

__all__ = ["dataset_folder"]


def bench(folder: Path, *arguments: str) -> dict[str, dict[str, float]]:
    ranks = start_commands(2, folder, "bench", "balance", *arguments, "--json", str(folder / "figures.json"))
    for number, rank in enumerate(ranks):
        rank.join(600)
        assert rank.exitcode == 0, (folder / f"rank-{number}.log").read_text()
    return json.loads((folder / "figures.json").read_text())


@pytest.mark.slow
def test_forced_activation_on_text_made_for_it(tmp_path: Path) -> None:
    """Which tokens are active does not depend on the machine, so neither do the figures of rows and cost."""
    small = "model={layers: 1, width: 32, qk_dim: 16, window: 16, vocab_size: 256}"
    batch = ("data.seq_len=128", "train.global_batch=16", "train.micro_batch=8", "train.precision=fp32")
    found = bench(tmp_path, "configs/quickstart.yaml", small, *batch, "--synthetic", "--ragged", "--steps", "24")
    assert found["domain"]["imbalance_rows"] > 1.2
    assert found["none"]["imbalance_rows"] > found["cost"]["imbalance_rows"]
    assert found["cost"]["imbalance_rows"] < 1.05
    assert found["cost"]["pred_r2"] > 0.5
    assert all(way["step_time"] > 0 and way["overhead"] > 0 for way in found.values())


@pytest.mark.slow
def test_from_a_checkpoint_on(dataset_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_on_ranks(train_on_rank, 1, tiny_config(dataset_folder, run, train__steps=5))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    trace = ("--trace", str(tmp_path / "trace.jsonl"))
    found = bench(tmp_path, str(run), "--steps", "6", "--exchange", "2", *trace)
    steps = [json.loads(line)["step"] for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert steps == [6, 7, 8, 9, 10, 11]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert len(found) == 8
    for name in ("domain, zero3", "domain, exchange"):  # neither changes what is activated
        assert found[name]["imbalance_rows"] == pytest.approx(found["domain"]["imbalance_rows"], abs=1e-3)
