"""Distributed training is one process's training: the same losses, gradients, weights and moments."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from megaboat.engine.deepspeed import Engine
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.layers.configurator import Routing
from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from tests.distributed import run_on_ranks
from tests.engine.conftest import tiny_config

STEPS, ROWS, LENGTH, VOCABULARY = 20, 4, 24, 64
SILENT = 0  # a row that begins with this token activates nothing in layer 1
SILENT_STEPS = range(5, 10)


class Trace(NamedTuple):
    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    """Of the first step."""
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    active_rows: list[int]
    """Of layer 1 on this rank, by step."""


def batches() -> Tensor:
    """(steps, rows, length + 1) tokens; in some steps the first half of the rows, rank 0's of 2, is silent."""
    tokens = torch.randint(1, VOCABULARY, (STEPS, ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    tokens[SILENT_STEPS.start : SILENT_STEPS.stop, : ROWS // 2, 0] = SILENT
    return tokens


def silence(model: nn.Module, now: dict[str, Tensor]) -> None:
    """Rows of `now["tokens"]` that begin with SILENT activate nothing in layer 1."""

    def hook(module: nn.Module, inputs: Any, routing: Routing) -> Routing:
        speaks_X = (now["tokens"][:, 0] != SILENT).repeat_interleave(LENGTH)[:, None]
        active_XM = routing.active_XM & speaks_X
        now["active"] = now["active"] + active_XM.sum()
        return Routing(active_XM, routing.confidence_XM * speaks_X, routing.margin_XM)

    model.blocks[1].sma.configurator.register_forward_hook(hook)


def train(ranks: Ranks, config: RunConfig) -> Trace:
    """Plain steps through the engine, on this rank's share of the rows."""
    torch.set_num_threads(1)
    model = build_model(config.model, seed=0)
    model.checkpoint_activations = config.train.checkpoint_activations
    now: dict[str, Tensor] = {"active": torch.zeros((), dtype=torch.int64)}
    silence(model, now)
    engine = Engine(model, config, ranks)
    engine.train()
    share = ROWS // ranks.size
    losses, norms, active_rows, gradients = [], [], [], {}
    for step, tokens in enumerate(batches()):
        mine = tokens[ranks.rank * share : (ranks.rank + 1) * share]
        now["active"].zero_()
        total = torch.zeros((), dtype=torch.float64)
        parts = mine.split(config.train.micro_batch)
        for i, part in enumerate(parts):
            now["tokens"] = part
            output = engine(part[:, :-1], Documents.whole(len(part), LENGTH), part[:, 1:])
            engine.backward(output.nll * ranks.size / (ROWS * LENGTH))
            total += output.nll.detach()
            if i + 1 < len(parts):
                engine.next_micro_batch()
        if step == 0:
            gradients = {name: gradient.clone() for name, gradient in engine.gradients()}
        active_rows.append(int(now["active"]))
        norms.append(engine.step(lr=1e-2))
        losses.append(float(ranks.sum(total)) / (ROWS * LENGTH))
    weights = {name: tensor.clone() for name, tensor in engine.weights()}
    moments = {name: tensor.clone() for name, tensor in engine.moments()}
    return Trace(losses, norms, gradients, weights, moments, active_rows)


def layout(folder: Path, zero: int, size: int, micro_steps: int, checkpointing: bool) -> RunConfig:
    return tiny_config(
        folder,
        folder,
        model__vocab_size=VOCABULARY,
        model__layers=3,
        train__global_batch=ROWS,
        train__micro_batch=ROWS // size // micro_steps,
        train__checkpoint_activations=checkpointing,
        parallel__zero=zero,
    )


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    (trace,) = run_on_ranks(train, 1, layout(tmp_path_factory.mktemp("one"), 0, 1, 1, False))
    return trace


@pytest.mark.parametrize(
    ("zero", "size", "micro_steps", "checkpointing"),
    [(1, 1, 2, True), (0, 2, 1, False), (1, 2, 1, False), (2, 2, 2, False), (3, 2, 1, False), (3, 2, 2, True)],
    ids=lambda value: str(value),
)
def test_equals_one_process(
    one_process: Trace, tmp_path: Path, zero: int, size: int, micro_steps: int, checkpointing: bool
) -> None:
    traces = run_on_ranks(train, size, layout(tmp_path, zero, size, micro_steps, checkpointing))
    if size == 2:
        silent = [traces[0].active_rows[step] for step in SILENT_STEPS]
        assert silent == [0] * len(SILENT_STEPS), "rank 0 was meant to activate nothing in layer 1"
        assert min(traces[1].active_rows) > 0
    for trace in traces:
        torch.testing.assert_close(trace.losses, one_process.losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(trace.norms, one_process.norms, rtol=1e-5, atol=0)
        torch.testing.assert_close(trace.gradients, one_process.gradients, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(trace.weights, one_process.weights, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(trace.moments, one_process.moments, rtol=1e-4, atol=1e-6)


def reload(ranks: Ranks, config: RunConfig, moments: dict[str, Tensor]) -> tuple[dict[str, Tensor], float, float]:
    """The moments after a round trip, AdamW's count of steps, and the sum of squares of what AdamW itself holds."""
    engine = Engine(build_model(config.model, seed=0), config, ranks)
    engine.set_moments(moments, updates=7)
    found = {name: tensor.clone() for name, tensor in engine.moments()}
    squares = sum(state["exp_avg"].double().square().sum() for state in engine._states())
    (updates,) = {float(state["step"]) for state in engine._states()}
    return found, updates, float(ranks.sum(squares)) if config.parallel.zero else float(squares)


@pytest.mark.parametrize(("zero", "size"), [(0, 1), (1, 2), (2, 2), (3, 2)], ids=lambda value: str(value))
def test_moments_enter_and_leave_unchanged(one_process: Trace, tmp_path: Path, zero: int, size: int) -> None:
    first = [tensor for name, tensor in one_process.moments.items() if name.startswith("exp_avg.")]
    expected = float(sum(tensor.double().square().sum() for tensor in first))
    for found, updates, squares in run_on_ranks(
        reload, size, layout(tmp_path, zero, size, 1, False), one_process.moments
    ):
        torch.testing.assert_close(found, one_process.moments, rtol=0, atol=0)
        assert updates == 7
        assert squares == pytest.approx(expected, rel=1e-6), "AdamW does not hold what was loaded"
