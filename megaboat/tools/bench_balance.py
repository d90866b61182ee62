"""Imbalance and step time on several ranks, by how the windows of a batch are dealt to them.

  torchrun --nproc-per-node 4 -m megaboat bench balance configs/pile_mini_cpu.yaml data.path=corpora/pile_mini
  torchrun --nproc-per-node 4 -m megaboat bench balance runs/mine --steps 30 --trace trace.jsonl
  torchrun --nproc-per-node 2 -m megaboat bench balance configs/125m.yaml --synthetic --ragged --exchange 2

Three runs with the same batches: sorted by source, in their order, by predicted cost; with `--exchange` as many again
under ZeRO-3, where ranks wait for each other in every layer, and two that exchange rows there. A line is printed when
its run is over. A run folder in place of a config goes on from its newest checkpoint, which stays as it is. `--ragged`
forces the activation of each window instead of leaving it to the model: between 0.05 and 0.95, by what the window says.
`--synthetic` writes text for it into a temporary folder: sources whose documents use few or many letters.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaboat.config import load_config
from megaboat.data.loader import WindowReader
from megaboat.data.prepare import Request, prepare
from megaboat.engine.build import open_run
from megaboat.engine.checkpoint import find_checkpoint
from megaboat.engine.deepspeed import connect
from megaboat.engine.hooks import Hook
from megaboat.engine.ranks import Ranks, this_process
from megaboat.engine.run_config import RunConfig
from megaboat.engine.stop import StopRequest
from megaboat.engine.trainer import Trainer
from megaboat.errors import BadInput
from megaboat.layers.configurator import Configurator, Routing
from megaboat.log import setup_logging
from megaboat.tools.options import output_file

WAYS = {
    "domain": ("sorted by source", ["balance.assignment=domain"]),
    "none": ("in their order", ["balance.assignment=none"]),
    "cost": ("by predicted cost", ["balance.assignment=cost"]),
}
COLUMNS = {
    "imbalance_rows": "rows",
    "imbalance_cost": "cost",
    "imbalance_time": "time",
    "cv1": "cv1",
    "pred_r2": "foreseen",
    "step_time": "step, ms",
    "overhead": "overhead, %",
}
SOURCES, SYNTHETIC_WINDOWS = 8, 256
SURVEYED = 64  # windows that say which variety of tokens is usual


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml|RUN")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--steps", type=int, default=60, metavar="N", help="of each way; the first third is not counted"
    )
    parser.add_argument("--ragged", action="store_true", help="force each window's activation, from 0.05 to 0.95")
    parser.add_argument("--synthetic", action="store_true", help="on text made for it, in place of data.path")
    parser.add_argument(
        "--exchange", type=int, metavar="N", help="also under ZeRO-3, then with rows exchanged between N neighbours too"
    )
    parser.add_argument(
        "--trace", type=output_file, metavar="FILE", help="keep the last way's trace, for balance simulate"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures to a file too")


def run(arguments: argparse.Namespace) -> None:
    ranks = this_process()
    setup_logging(ranks.rank, ranks.size)
    started = time.monotonic()
    ways = chosen(arguments.exchange)
    for _, changes in ways.values():
        _config(arguments, changes).check_world(ranks.size)
    connect(ranks)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as own:
        scratch = Path(ranks.gather_objects(own)[0])
        if arguments.synthetic:
            ranks.on_first(lambda: write_synthetic(scratch, _config(arguments, []).data.seq_len))
        for way, (words, changes) in ways.items():
            config = _config(arguments, [*_changes(arguments, scratch, way), *changes])
            ranks.on_first(partial(_start, arguments.config, config.train.out))
            recorder = _Recorder(ranks.device.type == "cuda")
            results[way] = measure(config, ranks, recorder, arguments.steps, arguments.ragged)
            if ranks.is_first:
                print(*[HEADER][len(results) > 1 :], line(words, results[way]), sep="\n", flush=True)
                _keep(arguments, results, recorder.trace)
    if ranks.is_first:
        print(f"took {time.monotonic() - started:.0f} s")
    dist.destroy_process_group()


def chosen(exchange: int | None) -> dict[str, tuple[str, list[str]]]:
    """What is run, by name: words for the table, changes of the configuration."""
    if exchange is None:
        return WAYS
    zero3, exchanged = ["parallel.zero=3"], ["parallel.zero=3", f"balance.exchange={exchange}"]
    more = [(way, "zero3", "ZeRO-3", zero3) for way in WAYS]
    more += [(way, "exchange", "ZeRO-3, exchanged", exchanged) for way in ("domain", "cost")]
    return WAYS | {
        f"{way}, {name}": (f"{WAYS[way][0]}, {words}", [*WAYS[way][1], *changes]) for way, name, words, changes in more
    }


def _keep(arguments: argparse.Namespace, results: dict[str, dict[str, float]], trace: list[dict[str, Any]]) -> None:
    if arguments.trace:
        arguments.trace.write_text("".join(json.dumps(record) + "\n" for record in trace))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def _config(arguments: argparse.Namespace, changes: list[str]) -> RunConfig:
    path = arguments.config / "config.yaml" if arguments.config.is_dir() else arguments.config
    return load_config(RunConfig, path, [*arguments.overrides, *changes])


def _changes(arguments: argparse.Namespace, scratch: Path, way: str) -> list[str]:
    checkpoint = find_checkpoint(arguments.config / "checkpoints")
    done = checkpoint.state["step"] if checkpoint else 0
    changes = [f"train.out={scratch / way.replace(', ', '-')}", f"train.steps={done + arguments.steps}"]
    if arguments.trace:
        changes.append("balance.trace_every=1")
    if arguments.synthetic:
        changes.append(f"data.path={scratch / 'tokens'}")
    return changes


def _start(given: Path, out: Path) -> None:
    """Make `out` a run that stands where the one in `given` does; a config's starts from nothing."""
    out.mkdir()
    checkpoint = find_checkpoint(given / "checkpoints")
    if checkpoint is not None:
        folder = out / "checkpoints" / checkpoint.folder.name
        folder.parent.mkdir()
        folder.symlink_to(checkpoint.folder.absolute())
        folder.with_name("latest").write_text(folder.name)


def write_synthetic(folder: Path, seq_len: int) -> None:
    """`folder/tokens`: SOURCES sources of bytes, the first of few letters and each other one of more; a document is as
    long as a window and has some letters more or fewer."""
    letters = np.frombuffer(bytes(range(33, 127)), np.uint8)
    generator = np.random.default_rng(0)
    with (folder / "text.jsonl").open("w") as file:
        for number in range(SYNTHETIC_WINDOWS):
            source = number % SOURCES
            usual = len(letters) * (1 + source) / SOURCES
            count = int(np.clip(usual * generator.uniform(0.7, 1.4), 2, len(letters)))
            text = generator.choice(letters[:count], seq_len).tobytes().decode()
            file.write(json.dumps({"text": text, "meta": {"pile_set_name": f"source {source}"}}) + "\n")
    prepare(Request({"train": [folder / "text.jsonl"]}, "bytes", folder / "tokens"))


def measure(
    config: RunConfig, ranks: Ranks, recorder: "_Recorder", steps: int, ragged: bool = False
) -> dict[str, float]:
    """Medians over the last two thirds of so many steps."""
    trainer = open_run(config, ranks)
    trainer.hooks = [recorder]
    if ragged:
        force_ragged(trainer)
    with trainer.watchdog, StopRequest() as stop:  # not `fit`, which evaluates and saves at the end
        for _ in range(steps):
            trainer.train_step(stop)
    trainer.loader.close()
    trainer.engine.close()  # a GPU need not hold the models of all ways
    if trainer.fence is not None:
        trainer.fence.release()
    kept = recorder.steps[len(recorder.steps) // 3 :]
    return {name: float(np.median([step[name] for step in kept])) for name in COLUMNS}


def force_ragged(trainer: Trainer) -> None:
    """Each row activates a share of its tokens that grows with how varied they are, and a little by chance: the same
    on any rank."""
    if trainer.balance is None:
        raise BadInput("bench balance --ragged: a model without decisions has no activation to force")
    order, config = trainer.balance.dealer.order, trainer.config.data
    usual = _variety(WindowReader(config, trainer.dataset, order.locate).read(0, SURVEYED, config.row_len).tokens_BT)
    middle, spread = float(usual.mean()), max(float(usual.std()), 1e-6)
    tokens: list[Tensor] = []
    model: nn.Module = trainer.engine.module
    model.register_forward_pre_hook(lambda _, inputs: tokens.__setitem__(slice(None), [inputs[0]]))

    def force(module: nn.Module, inputs: Any, routing: Routing) -> Routing:
        B, T = tokens[0].shape
        chance_B = (tokens[0].sum(1) % 1009) / 1009 - 0.5
        share_B = (0.5 + 0.25 * (_variety(tokens[0]) - middle) / spread + 0.2 * chance_B).clamp(0.05, 0.95)
        turn_BT = (torch.arange(T, device=share_B.device) * 0.618034) % 1  # spread evenly over the row
        active_XM = (turn_BT < share_B[:, None]).reshape(B * T, 1).expand_as(routing.active_XM)
        confidence_XM = torch.sigmoid(routing.margin_XM / routing.log_temperature_M.exp()) * active_XM
        return routing._replace(active_XM=active_XM, confidence_XM=confidence_XM)

    for module in model.modules():
        if isinstance(module, Configurator):
            module.register_forward_hook(force)


def _variety(tokens_BT: Tensor) -> Tensor:
    """(B,) the share of a row's tokens that are distinct."""
    return (1 + (tokens_BT.sort(1).values.diff(dim=1) > 0).sum(1)) / tokens_BT.shape[1]


HEADER = f"{'windows dealt':>37}" + "".join(f"{name:>{max(9, 2 + len(name))}}" for name in COLUMNS.values())


def line(words: str, found: dict[str, float]) -> str:
    """One way's figures under HEADER."""
    values = {**found, "step_time": 1000 * found["step_time"], "overhead": 100 * found["overhead"]}
    return f"{words:>37}" + "".join(f"{values[key]:>{max(9, 2 + len(name))}.3f}" for key, name in COLUMNS.items())


class _Recorder(Hook):
    """Keeps the figures of each step; the overhead is the balance's CPU time over that of the rank's own work, on a GPU
    over the step's time."""

    def __init__(self, cuda: bool) -> None:
        self._whole = "step_time" if cuda else "work_seconds"
        self.steps: list[dict[str, float]] = []
        self.trace: list[dict[str, Any]] = []

    def on_step(self, metrics: dict[str, Any]) -> None:
        step = {**metrics["balance"], "step_time": metrics["step_time"]}
        self.steps.append({**step, "overhead": step["seconds"] / step[self._whole]})

    def on_trace(self, record: dict[str, Any]) -> None:
        self.trace.append(record)
