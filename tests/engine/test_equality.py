"""Distributed training is one process's training: the same losses, gradients, weights and moments."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaboat.engine import deepspeed
from megaboat.engine.deepspeed import Engine
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from megaboat.parallel.parts import ALWAYS
from tests.distributed import run_on_ranks
from tests.engine import matrix
from tests.engine.equality import FORCED_STEPS, RATE, Layout, Trace, difference, pairs, pairwise, possible, train

USUAL = [
    Layout(1, 1, 1, 2, True),
    Layout(2, 1, 0),
    Layout(2, 1, 1),
    Layout(2, 1, 2, 2),
    Layout(2, 1, 3, 2, True),
    Layout(1, 2, 0, 2),
    Layout(1, 2, 3, 1, True),
    Layout(2, 2, 1, 1, True),
    Layout(1, 1, 2, 2, True, 2),
    Layout(1, 1, 3, 1, False, 4),
    Layout(1, 2, 1, 1, True, 2),
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    (trace,) = run_on_ranks(train, 1, Layout().config(tmp_path_factory.mktemp("one")))
    return trace


@pytest.mark.parametrize(
    "layout",
    [*USUAL, *(pytest.param(layout, marks=pytest.mark.slow) for layout in pairwise(USUAL))],
    ids=lambda layout: "-".join(str(int(value)) for value in layout),
)
def test_equals_one_process(one_process: Trace, tmp_path: Path, layout: Layout) -> None:
    traces = run_on_ranks(train, layout.ranks, layout.config(tmp_path))
    if layout.data > 1:
        forced = slice(FORCED_STEPS.start, FORCED_STEPS.stop)
        assert not any(traces[0].active_rows()[forced]), "the first copy was meant to activate nothing in layer 1"
        assert traces[-1].active[forced, 1].all(), "the last copy was meant to activate everything"
    found = difference(traces, one_process, layout)
    assert found.is_none(), found


def train_in_small_pieces(ranks: Ranks, config: RunConfig) -> Trace:
    """`train` with thresholds at which even this model's weights are released, fetched ahead and reduced in parts."""
    whole = deepspeed.engine_settings

    def small(*arguments: Any) -> dict[str, Any]:
        settings = whole(*arguments)
        settings["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 40,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 3000,
            "reduce_bucket_size": 6000,
        }
        return settings

    deepspeed.engine_settings = small  # the process is this rank's own
    return train(ranks, config)


@pytest.mark.slow
def test_weights_that_come_and_go_are_the_same(one_process: Trace, tmp_path: Path) -> None:
    layout = Layout(2, 1, 3, 2, True)
    found = difference(run_on_ranks(train_in_small_pieces, 2, layout.config(tmp_path)), one_process, layout)
    assert found.is_none(), found


def train_in_even_parts(ranks: Ranks, config: RunConfig) -> Trace:
    """`train` with pieces of rows that share their active rows in every layer, whatever that costs."""
    deepspeed.sequence.join = partial(deepspeed.sequence.join, price=ALWAYS)  # the process is this rank's own
    return train(ranks, config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [Layout(1, 1, 2, 2, True, 2), Layout(1, 1, 3, 1, False, 4), Layout(1, 2, 1, 1, True, 2)], ids=str
)
def test_even_parts_of_rows_are_the_same(one_process: Trace, tmp_path: Path, layout: Layout) -> None:
    traces = run_on_ranks(train_in_even_parts, layout.ranks, layout.config(tmp_path))
    found = difference(traces, one_process, layout)
    assert found.is_none(), found


OFFLOADED = [Layout(2, 1, 1, 2), Layout(1, 2, 2, 1, True), Layout(2, 1, 3, 2)]


@pytest.mark.parametrize(
    "layout", [OFFLOADED[0], *(pytest.param(layout, marks=pytest.mark.slow) for layout in OFFLOADED[1:])], ids=str
)
def test_an_optimizer_on_the_host_takes_the_same_steps(one_process: Trace, tmp_path: Path, layout: Layout) -> None:
    traces = run_on_ranks(train, layout.ranks, layout.config(tmp_path, parallel__offload="optimizer"))
    found = difference(traces, one_process, layout)
    assert found.is_none(), found


def test_the_matrix_covers_every_pair_that_four_ranks_allow() -> None:
    assert pairs([*USUAL, *pairwise(USUAL)]) == pairs(pairwise()) == pairs(possible())


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--hepl", 2), ("everything", 2)])
def test_the_matrix_begins_only_when_asked_to(argument: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        matrix.main([argument])
    assert ended.value.code == code
    said = capsys.readouterr()
    assert ("minutes" in said.out) == (code == 0)
    assert (argument in said.err) == (code == 2)


def reload(ranks: Ranks, config: RunConfig, moments: dict[str, Tensor]) -> tuple[dict[str, Tensor], float, float]:
    """The moments after a round trip, AdamW's count of steps, and the sum of squares of what AdamW itself holds."""
    ranks = ranks.in_mesh(config.parallel.tensor, config.parallel.sequence)
    engine = Engine(build_model(config.model, seed=0), config, ranks)
    engine.set_moments(moments, updates=7)
    found = {name: tensor.clone() for name, tensor in engine.moments()}
    squares = sum(state["exp_avg"].double().square().sum() for state in engine._states())
    (updates,) = {float(state["step"]) for state in engine._states()}
    return found, updates, float(ranks.sum(squares)) if config.parallel.zero else float(squares)


@pytest.mark.parametrize(
    ("layout", "offload"),
    [
        (Layout(1, 1, 0), "none"),
        (Layout(2, 1, 1), "none"),
        (Layout(2, 1, 2), "none"),
        (Layout(2, 1, 3), "none"),
        (Layout(2, 1, 1), "optimizer"),
        (Layout(2, 1, 3), "optimizer"),
    ],
    ids=str,
)
def test_moments_enter_and_leave_unchanged(one_process: Trace, tmp_path: Path, layout: Layout, offload: str) -> None:
    config = layout.config(tmp_path, parallel__offload=offload)
    first = [tensor for name, tensor in one_process.moments.items() if name.startswith("exp_avg.")]
    expected = float(sum(tensor.double().square().sum() for tensor in first))
    for found, updates, squares in run_on_ranks(reload, layout.ranks, config, one_process.moments):
        torch.testing.assert_close(found, one_process.moments, rtol=0, atol=0)
        assert updates == 7
        assert squares == pytest.approx(expected, rel=1e-6), "AdamW does not hold what was loaded"


def norms_of_a_step(ranks: Ranks, config: RunConfig) -> tuple[Counter[str], Counter[str]]:
    """How often torch takes a norm of any kind in `gradient_norm`, and then in `step`."""
    engine = Engine(build_model(config.model, seed=0), config, ranks)
    engine.backward(engine(torch.ones(1, 8, dtype=torch.long), Documents.whole(1, 8), torch.ones(1, 8).long()).nll)
    counts = []
    for action in (engine.gradient_norm, partial(engine.step, RATE)):
        with torch.profiler.profile() as profile:
            action()
        counts.append(Counter(event.name for event in profile.events() if "norm" in event.name))
    return counts[0], counts[1]


@pytest.mark.parametrize("zero", [2, 3])
def test_a_norm_of_all_gradients_is_taken_at_once_and_once_a_step(tmp_path: Path, zero: int) -> None:
    for of_norm, of_step in run_on_ranks(norms_of_a_step, 2, Layout(2, zero=zero).config(tmp_path)):
        assert of_norm["aten::_foreach_norm"] == 1
        assert of_step <= Counter({"aten::linalg_vector_norm": zero == 3}), "ZeRO-3 joins what it has, one number"
