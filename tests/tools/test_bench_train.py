"""`bench train` on a CPU at toy size: every row by the real engine, and none of a model that is wrong."""

import dataclasses
import weakref

import pytest
import torch

from megaboat.cli import main
from megaboat.engine.ranks import Ranks
from megaboat.model.config import LlamaConfig, SeqBoatConfig
from megaboat.tools import bench, bench_train
from megaboat.tools.bench import BENCHES
from megaboat.tools.bench_forced import _decisions
from megaboat.tools.bench_train import Row, Sizes, compare, line
from tests.distributed import run_on_ranks

TOY = Sizes(
    families={
        "llama": LlamaConfig(family="llama", vocab_size=64, layers=1, width=16, heads=2),
        "seqboat": SeqBoatConfig(block="paper", vocab_size=64, layers=2, width=16, qk_dim=8, window=4),
    },
    lengths=(32,),
    ratios=(1.0, 0.25),
    tokens=64,
    steps=2,
    precision="fp32",
)


def measured(ranks: Ranks, limit: int) -> list[Row]:
    """The toy comparison; a micro-batch over `limit` rows is said not to fit."""
    measure = bench_train.measure

    def with_little_memory(*args: object) -> Row:
        if args[2].train.micro_batch > limit:
            raise torch.OutOfMemoryError("no room")
        return measure(*args)

    bench_train.measure = with_little_memory
    try:
        return list(compare(TOY, ranks))
    finally:
        bench_train.measure = measure


def test_a_row_that_does_not_fit_says_so_and_ends_nothing() -> None:
    rows = run_on_ranks(measured, 1, 0)[0]
    assert [(row.family, row.activation, row.mode) for row in rows] == [
        ("llama", None, "exact"),
        ("seqboat", 0.25, "exact"),
        ("seqboat", 0.25, "exact"),
        ("seqboat", 1.0, "exact"),
    ]
    for row in rows:
        assert line(row, rows).endswith("does not fit, even one row with all recomputed")
    told = dataclasses.replace(rows[1], problem="", tokens_per_second=1.0)
    assert "1  0.0%" in line(told, rows), "no ratio to a Llama that did not fit"


@pytest.mark.parametrize("limit", [2, 1], ids=["fits", "halved"])
def test_every_row_is_measured(limit: int) -> None:
    rows = run_on_ranks(measured, 1, limit)[0]
    kinds = [(row.family, row.pattern) for row in rows]
    assert kinds == [("llama", None), ("seqboat", "random"), ("seqboat", "runs"), ("seqboat", "random")]
    assert [row.micro_batch for row in rows] == [limit] * 4
    assert 0.1 < rows[1].activation < 0.4
    assert rows[3].activation == 1
    assert all(row.tokens_per_second > 0 and row.mfu is None and row.recomputed == "nothing" for row in rows)
    assert "x Llama" in bench_train.HEADER
    assert line(rows[0], rows).split()[-3] == "1.00"


def measured_in_all_modes(ranks: Ranks) -> list[Row]:
    families = {"seqboat": TOY.families["seqboat"]}
    return list(compare(dataclasses.replace(TOY, families=families, ratios=(0.25,), modes=bench_train.MODES), ranks))


def test_every_mode_has_its_row() -> None:
    """On a CPU the graph's says why there is none."""
    rows = run_on_ranks(measured_in_all_modes, 1)[0]
    assert [(row.pattern, row.mode) for row in rows] == [
        (pattern, mode) for pattern in TOY.patterns for mode in bench_train.MODES
    ]
    for exact, capacity, full, graph, published in (rows[:5], rows[5:]):
        activations = {row.activation for row in (exact, capacity, full, published)}
        assert len(activations) == 1, "there are rows to spare: none is turned away"
        assert min(row.tokens_per_second for row in (capacity, full, published)) > 0
        assert graph.problem.startswith("not captured: ")
        assert graph.problem in line(graph, rows)


def alive_after_a_row(ranks: Ranks, zero: int) -> int:
    seen: list[weakref.ref] = []
    build = bench_train.build_model
    bench_train.build_model = lambda *args: (model := build(*args), seen.append(weakref.ref(model)))[0]
    try:
        sizes = dataclasses.replace(TOY, zero=zero)
        config = bench_train.step_config(TOY.families["seqboat"], 32, 2, "nothing", sizes)
        cases = [(0.25, "runs", "exact"), (1.0, "random", "capacity")]
        assert len(list(bench_train._rows("seqboat", config, cases, 1, ranks))) == 2
    finally:
        bench_train.build_model = build
    bench_train._free()
    return sum(model() is not None for model in seen)


@pytest.mark.parametrize("zero", [0, 1])
def test_a_row_leaves_no_model_behind(zero: int) -> None:
    """Two models of a billion parameters do not fit beside each other."""
    assert run_on_ranks(alive_after_a_row, 1, zero) == [0]


def test_runs_have_the_ratio_and_the_length_that_they_say() -> None:
    active_X = _decisions(200_000, 0.25, "runs", torch.Generator().manual_seed(1))
    assert float(active_X.float().mean()) == pytest.approx(0.25, abs=0.02)
    starts = (active_X[1:] & ~active_X[:-1]).sum() + active_X[0]
    assert float(active_X.sum() / starts) == pytest.approx(64, rel=0.1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("train", "bench train needs a CUDA device"),
        ("train --ratios 0.5,25", "--ratios 25: a share of tokens, from 0 to 1"),
        ("train --ratios half", "could not convert string to float: 'half'"),
        ("train --lengths 0", "--lengths 0: at least 1"),
        ("train --steps 0", "--steps 0: at least 1"),
        ("train --families mamba", "--families: no mamba; there are llama, seqboat, scaled"),
        ("profile", "bench profile needs a CUDA device"),
        ("profile --ratio 25", "--ratio 25: a share of tokens, from 0 to 1"),
        ("profile --length 0", "--length 0: at least 1"),
        ("profile --micro-batch -1", "--micro-batch -1: at least 1"),
    ],
)
def test_refuses_in_one_line(
    options: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options before the device: what is wrong with them is said on any machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *options.split()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_help_explains_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    for name, module in BENCHES.items():
        with pytest.raises(SystemExit):
            main(["bench", name, "--help"])
        assert (module.__doc__ or "").strip() in capsys.readouterr().out
        assert f"bench {name}" in (bench.__doc__ or "")
