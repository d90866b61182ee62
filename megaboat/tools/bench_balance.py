"""Imbalance and step time on several ranks, by how the windows of a batch are dealt to them.

  torchrun --nproc-per-node 4 -m megaboat bench balance configs/pile_mini_cpu.yaml data.path=corpora/pile_mini
  torchrun --nproc-per-node 2 -m megaboat bench balance configs/125m.yaml data.path=corpora/pile --ragged

Three runs with the same batches: sorted by source, in their order, by predicted cost. `--ragged` forces the activation
of each window instead of leaving it to the model: between 0.05 and 0.95, by what the window says.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaboat.config import load_config
from megaboat.engine.build import open_run
from megaboat.engine.deepspeed import connect
from megaboat.engine.hooks import Hook
from megaboat.engine.ranks import Ranks, this_process
from megaboat.engine.run_config import RunConfig
from megaboat.engine.stop import StopRequest
from megaboat.layers.configurator import Configurator, Routing
from megaboat.log import setup_logging

WAYS = {"domain": "sorted by source", "none": "in their order", "cost": "by predicted cost"}
COLUMNS = {
    "imbalance_rows": "rows",
    "imbalance_cost": "cost",
    "imbalance_time": "time",
    "cv1": "cv1",
    "pred_r2": "foreseen",
    "step_time": "step, ms",
    "overhead": "overhead, %",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--steps", type=int, default=60, metavar="N", help="of each way; the first third is not counted"
    )
    parser.add_argument("--ragged", action="store_true", help="force each window's activation, from 0.05 to 0.95")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="keep the last way's trace, for balance simulate")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file too")


def run(arguments: argparse.Namespace) -> None:
    ranks = this_process()
    setup_logging(ranks.rank, ranks.size)
    connect(ranks)
    results = {}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = ranks.gather_objects(scratch)[0]
            changes = [f"train.out={folder}/run", f"train.steps={arguments.steps}", f"balance.assignment={way}"]
            changes += ["balance.trace_every=1"] if arguments.trace else []
            config = load_config(RunConfig, arguments.config, [*arguments.overrides, *changes])
            recorder = _Recorder()
            results[way] = measure(config, ranks, recorder, arguments.ragged)
            ranks.barrier()
    if ranks.is_first:
        print(table(results))
        if arguments.trace:
            arguments.trace.write_text("".join(json.dumps(line) + "\n" for line in recorder.trace))
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    dist.destroy_process_group()


def measure(config: RunConfig, ranks: Ranks, recorder: "_Recorder", ragged: bool) -> dict[str, float]:
    """Medians over the last two thirds of a run's steps."""
    trainer = open_run(config, ranks)
    trainer.hooks = [recorder]
    if ragged:
        force_ragged(trainer.engine.module)
    with trainer.watchdog, StopRequest() as stop:  # not `fit`, which evaluates and saves at the end
        for _ in range(config.train.steps):
            trainer.train_step(stop)
    trainer.loader.close()
    if trainer.fence is not None:
        trainer.fence.release()
    kept = recorder.steps[len(recorder.steps) // 3 :]
    return {name: float(np.median([step[name] for step in kept])) for name in COLUMNS}


def force_ragged(model: nn.Module) -> None:
    """Each row activates a share of its tokens that grows with how varied they are: the same on any rank."""
    tokens: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: tokens.__setitem__(slice(None), [inputs[0]]))

    def force(module: nn.Module, inputs: Any, routing: Routing) -> Routing:
        B, T = tokens[0].shape
        distinct_B = 1 + (tokens[0].sort(1).values.diff(dim=1) > 0).sum(1)
        share_B = (3 * distinct_B / T - 0.9).clamp(0.05, 0.95)  # 0.3 to 0.6 of a row's tokens are distinct
        turn_BT = (torch.arange(T, device=share_B.device) * 0.618034) % 1  # spread evenly over the row
        active_XM = (turn_BT < share_B[:, None]).reshape(B * T, 1).expand_as(routing.active_XM)
        confidence_XM = torch.sigmoid(routing.margin_XM / routing.temperature_M) * active_XM
        return routing._replace(active_XM=active_XM, confidence_XM=confidence_XM)

    for module in model.modules():
        if isinstance(module, Configurator):
            module.register_forward_hook(force)


def table(results: dict[str, dict[str, float]]) -> str:
    """One line a way."""
    lines = [["windows dealt", *COLUMNS.values()]]
    for way, found in results.items():
        values = {**found, "step_time": 1000 * found["step_time"], "overhead": 100 * found["overhead"]}
        lines.append([WAYS[way], *(f"{values[name]:.3f}" for name in COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


class _Recorder(Hook):
    """Keeps the figures of each step; the overhead is the balance's CPU time over that of the rank's own work."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.trace: list[dict[str, Any]] = []

    def on_step(self, metrics: dict[str, Any]) -> None:
        balance = metrics["balance"]
        overhead = balance["seconds"] / balance["work_seconds"]
        self.steps.append({**balance, "step_time": metrics["step_time"], "overhead": overhead})

    def on_trace(self, record: dict[str, Any]) -> None:
        self.trace.append(record)
