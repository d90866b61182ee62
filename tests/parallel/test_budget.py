"""Control of activation in training: a budget is reached and kept, a dead layer comes back or is named."""

from pathlib import Path

import numpy as np
import pytest

from megaboat.engine.build import open_run
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from tests.distributed import run_on_ranks
from tests.engine.conftest import dataset_folder, tiny_config
from tests.engine.runs import metrics, train_on_rank

__all__ = ["dataset_folder"]


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "size"), [(0.1, 1), (0.2, 1), (0.3, 2), (0.5, 1)])
def test_a_budget_in_training(dataset_folder: Path, tmp_path: Path, budget: float, size: int) -> None:
    """After 50 steps each layer's share is within 0.02 in the mean of 15 steps: single ones are a thousand tokens."""
    config = tiny_config(
        dataset_folder,
        tmp_path / "run",
        data__seq_len=128,
        train__steps=80,
        train__global_batch=8,
        train__micro_batch=4,
        train__save_every=0,
        balance__budget=budget,
        model__ffn_dim=128,
    )
    run_on_ranks(train_on_rank, size, config)
    ratio_SL = np.array([line["activation_ratio"] for line in metrics(tmp_path / "run")])
    for first in (50, 65):
        assert np.abs(ratio_SL[first : first + 15].mean(0) - budget).max() < 0.02


def train_with_a_dead_layer(ranks: Ranks, config: RunConfig) -> None:
    """Without ZeRO the module's parameters are those that train."""
    trainer = open_run(config, ranks)
    trainer.engine.module.blocks[1].sma.configurator.logits.bias.data[1] -= 200.0
    trainer.fit()


@pytest.mark.slow
@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_a_dead_layer(dataset_folder: Path, tmp_path: Path, floor: float) -> None:
    changes = {"train__steps": 103, "train__save_every": 0, "parallel__zero": 0, "balance__floor": floor}
    config = tiny_config(dataset_folder, tmp_path / "run", data__seq_len=64, **changes)
    run_on_ranks(train_with_a_dead_layer, 1, config)
    lines = metrics(tmp_path / "run")
    assert lines[0]["activation_ratio"][1] == 0
    late = np.mean([line["activation_ratio"][1] for line in lines[-20:]])
    log = (tmp_path / "run" / "log.txt").read_text()
    if floor:
        assert late > 0.8 * floor
        assert lines[-1]["dead"] == []
    else:
        assert late == 0
        assert lines[-1]["dead"] == [1]
        assert "layer 1: activation below 0.5 % for 100 steps; balance.floor revives it" in log
