"""Bit-identical reruns, and a trace that opens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megaboat.config import load_config
from megaboat.engine.build import open_run
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput
from tests.distributed import run_on_ranks
from tests.engine.conftest import tiny_config
from tests.engine.runs import metrics, train_on_rank


def deterministic_run(ranks: Ranks, config: RunConfig) -> bool:
    """Memory comes as it is, where torch would fill it, gigabytes of DeepSpeed's buckets too: nobody may read it."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[assignment]
    trainer = open_run(config, ranks)
    trainer.fit()
    return torch.are_deterministic_algorithms_enabled()


def test_the_same_bits_again(dataset_folder: Path, tmp_path: Path) -> None:
    """Two runs on two ranks with dropout: losses, norms, decisions, and every byte of weights and moments."""
    kept: list[Any] = []
    for name in ("a", "b"):
        changes = {"train__deterministic": True, "train__micro_batch": 1, "model__dropout": 0.1, "train__steps": 4}
        config = tiny_config(dataset_folder, tmp_path / name, **changes)
        assert run_on_ranks(deterministic_run, 2, config) == [True] * 2
        lines = [(line["loss"], line["grad_norm"], line["activation_ratio"]) for line in metrics(tmp_path / name)]
        newest = tmp_path / name / "checkpoints" / "step-4"
        kept.append((lines, {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}))
    assert kept[0] == kept[1]


def test_a_trace_of_the_steps_asked_for(dataset_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(dataset_folder, tmp_path / "run", train__profile="3:5", train__steps=7)
    assert run_on_ranks(train_on_rank, 1, config) == [("done", 7)]
    trace = json.loads((tmp_path / "run" / "profile" / "steps-3-5.json").read_text())
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    steps = {event["name"]: (event["ts"], event["ts"] + event["dur"]) for event in events if "step " in event["name"]}
    assert {"step 3", "step 4", "step 5"} <= set(steps)
    assert not {"step 2", "step 6"} & set(steps)
    assert steps["step 3"][1] <= steps["step 4"][0] <= steps["step 4"][1] <= steps["step 5"][0]
    products = [event["ts"] for event in events if event["name"] == "aten::mm"]
    for first, last in (steps[f"step {step}"] for step in (3, 4, 5)):
        assert any(first < time < last for time in products), "the work of each step lies in it"


@pytest.mark.parametrize("window", ["5:3", "0:2", "3", "a:b"])
def test_a_window_that_is_none(window: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="train.profile"):
        tiny_config(tmp_path, tmp_path / "run", train__profile=window)


def test_a_window_on_the_command_line_is_no_number_to_base_60() -> None:
    assert load_config(RunConfig, None, ["train.profile=3:5"]).train.profile == "3:5"
    assert load_config(RunConfig, None, ["optim.lr=1.5e-3", "train.steps=0x10"]).train.steps == 16
