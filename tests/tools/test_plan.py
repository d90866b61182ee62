"""The planner's command: every shipped configuration, sums that add up, obstacles with their remedy."""

import re
from pathlib import Path

import pytest

from megaboat.cli import main
from megaboat.config import load_config
from megaboat.engine.run_config import RunConfig
from megaboat.model.memory import starting_bytes
from megaboat.tools.plan_layout import (
    GPUS,
    USABLE,
    Layout,
    large_enough,
    layout_memory,
    layouts,
    micro_steps,
    rank_parameters,
    recommend,
    sent_bytes,
    step_seconds,
)

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {"125m": 125e6, "350m": 350e6, "1b": 1e9, "3b": 3e9, "7b": 7e9, "13b": 13e9, "30b": 30e9}


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_planned(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(CONFIGS / f"{size}.yaml"), "--gpus", "8,64,512,4096"]) == 0
    said = capsys.readouterr().out
    named = float(re.search(r"yaml: ([\d,.]+) M parameters", said)[1].replace(",", "")) * 1e6  # type: ignore[index]
    assert named == pytest.approx(SIZES[size], rel=0.09)
    head = re.search(r"of ([\d.]+) ([MB]) parameters", (CONFIGS / f"{size}.yaml").read_text())
    assert head is not None
    assert float(head[1]) * {"M": 1e6, "B": 1e9}[head[2]] == pytest.approx(named, rel=1e-3)
    config = load_config(RunConfig, CONFIGS / f"{size}.yaml")
    tokens = config.train.steps * config.train.global_batch * config.data.seq_len
    assert tokens / named == pytest.approx(20, rel=0.05)
    assert said.count("<- as configured") == 1
    assert "nothing " not in said, "there is a layout for every number, and eight GPUs hold every size"
    assert "assumptions: " in said
    assert max(map(len, said.splitlines())) < 160


def test_under_zero_3_the_start_shrinks_with_the_ranks_to_one_block() -> None:
    config = load_config(RunConfig, CONFIGS / "30b.yaml")
    parameters = rank_parameters(config, 1)
    whole = 4.0 * parameters.total
    on = {ranks: starting_bytes(config.model, parameters, 3, ranks, 0) for ranks in (1, 8, 4096)}
    assert on[1] - on[8] == pytest.approx(7 / 8 * whole)
    assert on[4096] < whole / config.model.layers * 1.2
    assert starting_bytes(config.model, parameters, 1, 8, 0) > whole
    assert starting_bytes(config.model, parameters, 3, 8, 1 << 18) <= 80e9, "calibration beside it"


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(RunConfig, CONFIGS / "1b.yaml")


def test_the_recommended_layout_is_one_that_trains_and_fits(config: RunConfig) -> None:
    parameters = rank_parameters(config, 1)
    for name, gpu in GPUS.items():
        for gpus in (8, 64):
            layout = recommend(config, gpus, gpu, 0.4)
            assert layout is not None, name
            assert layout_memory(config, parameters, layout, 1.0).total <= USABLE * gpu.memory
            assert micro_steps(config, layout) * layout.shares * layout.micro_batch == config.train.global_batch
            config.check_world(gpus)
            assert layout.tensor == layout.sequence == 1, "no need of them here"
            plain = [other for other in layouts(config, gpus) if other.tensor == other.sequence == 1]
            fitting = [x for x in plain if layout_memory(config, parameters, x, 1.0).total <= USABLE * gpu.memory]
            best = min(sum(step_seconds(config, parameters, other, gpu, 0.4)) for other in fitting)
            assert sum(step_seconds(config, parameters, layout, gpu, 0.4)) <= 1.05 * best


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.offload=optimizer"],
        ["balance.exchange=2"],
        ["train.recompute_elementwise=true", "train.checkpoint_activations=false"],
        ["train.capacity=0.5"],
    ],
    ids=lambda overrides: overrides[0] if overrides else "as shipped",
)
def test_what_is_recommended_training_accepts(overrides: list[str]) -> None:
    for size, gpus in (("350m", 8), ("1b", 512), ("30b", 64)):
        config = load_config(RunConfig, CONFIGS / f"{size}.yaml", overrides)
        config = large_enough(config, gpus)
        layout = recommend(config, gpus, GPUS["H200"], 0.5)
        assert layout is not None
        cut = [
            f"train.global_batch={config.train.global_batch}",
            f"parallel.zero={layout.zero}",
            f"parallel.tensor={layout.tensor}",
        ]
        cut += [f"parallel.sequence={layout.sequence}", f"train.micro_batch={layout.micro_batch}"]
        cut += [f"train.checkpoint_activations={str(layout.checkpointing).lower()}"]
        load_config(RunConfig, CONFIGS / f"{size}.yaml", [*overrides, *cut]).check_world(gpus)


@pytest.mark.parametrize(
    ("gpus", "overrides", "message"),
    [
        (8, ["parallel.tensor=16"], "on 8 GPUs: 8 ranks are not a multiple of parallel.tensor 16"),
        (2, ["parallel.tensor=4"], "on 2 GPUs: 2 ranks are not a multiple of parallel.tensor 4"),
        (6, ["parallel.tensor=3"], "model.heads 16 is not a multiple of parallel.tensor 3"),
        (8, ["parallel.sequence=16"], "on 8 GPUs: 8 ranks are not a multiple of parallel.tensor 1 x"),
        (9, ["balance.exchange=2"], "on 9 GPUs: 9 ranks are not a multiple of balance.exchange 2"),
    ],
)
def test_what_training_refuses_is_not_planned(
    gpus: int, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(CONFIGS / "1b.yaml"), "--gpus", str(gpus), *overrides]) == 2
    assert message in capsys.readouterr().err


def test_a_batch_that_cannot_be_dealt_as_configured_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(CONFIGS / "1b.yaml"), "--gpus", "8", "train.micro_batch=3"]) == 0
    assert "as configured it does not train on 8 GPUs: train.global_batch 128 is not" in capsys.readouterr().out


# Tokens a second of the 1b configuration as docs/performance.md has them: rows a step, and a layout.
MEASURED = {
    "one GPU": (65_216, 16, Layout(1, 0, 4, True)),
    "ZeRO-1": (126_984, 16, Layout(2, 1, 4, True)),
    "ZeRO-2": (123_214, 16, Layout(2, 2, 4, True)),
    "ZeRO-3": (111_473, 16, Layout(2, 3, 4, True)),
    "tensor 2": (104_262, 16, Layout(2, 1, 8, True, tensor=2)),
    "sequence 2": (76_905, 16, Layout(2, 1, 8, True, sequence=2)),
    "a row of 1M tokens": (121_900, 1, Layout(2, 2, 1, True, sequence=2)),
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_step_takes_as_long_as_it_was_measured_to(name: str) -> None:
    measured, rows, layout = MEASURED[name]
    length = 1 << 20 if rows == 1 else 8192
    batch = [f"train.global_batch={rows}", f"train.micro_batch={layout.micro_batch}", f"data.seq_len={length}"]
    config = load_config(RunConfig, CONFIGS / "1b.yaml", batch)
    seconds = sum(step_seconds(config, rank_parameters(config, layout.tensor), layout, GPUS["H200"], 0.5))
    assert rows * length / seconds == pytest.approx(measured, rel=0.05)


def test_an_offloaded_update_takes_longer_and_its_memory_is_named(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    offloaded = load_config(RunConfig, CONFIGS / "1b.yaml", ["parallel.offload=optimizer"])
    parameters, layout = rank_parameters(config, 1), Layout(8, 1, 4, True)
    here, there = (step_seconds(one, parameters, layout, GPUS["H200"], 0.5)[0] for one in (config, offloaded))
    assert there > here
    assert main(["plan", str(CONFIGS / "1b.yaml"), "--gpus", "8", "parallel.offload=optimizer"]) == 0
    said = re.search(r"of the host's memory, ([\d.]+) GB a node", capsys.readouterr().out)
    assert said is not None
    assert float(said[1]) == pytest.approx(12 * parameters.total / 1e9, abs=0.02)


def test_memory_and_traffic_move_as_the_stages_promise(config: RunConfig) -> None:
    parameters = rank_parameters(config, 1)
    stages = [layout_memory(config, parameters, Layout(64, zero, 2, True), 1.0) for zero in (0, 1, 2, 3)]
    assert stages[0].optimizer == 8 * parameters.total
    assert stages[3].parameters + stages[3].optimizer == pytest.approx(16 * parameters.total / 64)
    for part in ("parameters", "gradients"):
        values = [getattr(stage, part) for stage in stages]
        assert values[3] < values[0]
    off, on = (layout_memory(config, parameters, Layout(64, 1, 2, on), 1.0).activations for on in (False, True))
    assert on < off / 3
    half, full = (layout_memory(config, parameters, Layout(64, 1, 2, False), share).total for share in (0.5, 1.0))
    assert half < full
    assert sent_bytes(config, parameters, Layout(1, 0, 2, False)) == 0
    assert sent_bytes(config, parameters, Layout(2, 0, 2, False)) == 4 * parameters.total
    often, seldom = (sent_bytes(config, parameters, Layout(8, 3, rows, False)) for rows in (1, 4))
    assert often == 4 * seldom


def test_fixed_rows_are_the_worst_case(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    parameters, layout = rank_parameters(config, 1), Layout(8, 1, 4, False)
    limited = load_config(RunConfig, CONFIGS / "1b.yaml", ["train.capacity=0.5"])
    half = layout_memory(config, parameters, layout, 0.5)
    assert [layout_memory(limited, parameters, layout, share) for share in (0.1, 1.0)] == [half, half]
    assert any(other.sequence > 1 for other in layouts(config, 64))
    assert not any(other.sequence > 1 for other in layouts(limited, 64))
    assert main(["plan", str(CONFIGS / "1b.yaml"), "train.capacity=0.5"]) == 0
    said = capsys.readouterr().out
    assert "rows for 0.5 of the tokens" in said
    assert "at activation 0.5; " in said
    assert "at activation 1; " not in said


def test_an_offloaded_optimizer_leaves_the_gpu_alone(config: RunConfig) -> None:
    parameters = rank_parameters(config, 1)
    parallel = config.parallel.model_copy(update={"offload": "optimizer"})
    offloaded = config.model_copy(update={"parallel": parallel})
    for zero in (1, 2, 3):
        here, there = (layout_memory(one, parameters, Layout(8, zero, 2, True), 1.0) for one in (config, offloaded))
        assert here.optimizer == 12 * parameters.total / 8
        assert there.optimizer == 0
        assert there.total <= here.total - here.optimizer


def test_what_crosses_borders_stands_beside_attention_over_all(capsys: pytest.CaptureFixture[str]) -> None:
    cut = ["parallel.sequence=4", "data.seq_len=1048576", "model.vocab_size=256", "--gpus", "8", "--activation", "0.5"]
    assert main(["plan", str(CONFIGS / "1b.yaml"), *cut]) == 0
    table = capsys.readouterr().out.split("1,048,576 tokens over 4 GPUs\n")[1]
    borders, even, ring, ulysses = (float(line.split()[0].replace(",", "")) for line in table.splitlines()[:4])
    assert borders < even / 10
    assert even < ulysses < ring


def test_more_gpus_than_rows_share_rows_or_models(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    layout = recommend(config, 512, GPUS["H200"], 0.4)
    assert layout is not None
    assert layout.tensor * layout.sequence >= 4
    assert layout.shares <= config.train.global_batch
    assert main(["plan", str(CONFIGS / "1b.yaml"), "--gpus", "4096"]) == 0
    assert "with train.global_batch=512" in capsys.readouterr().out


def test_cutting_a_model_or_a_row_takes_the_memory_it_should(config: RunConfig) -> None:
    whole = layout_memory(config, rank_parameters(config, 1), Layout(8, 0, 2, False), 1.0)
    half = layout_memory(config, rank_parameters(config, 2), Layout(8, 0, 2, False, tensor=2), 1.0)
    pieces = layout_memory(config, rank_parameters(config, 1), Layout(8, 0, 2, False, sequence=2), 1.0)
    assert 0.5 < half.parameters / whole.parameters < 0.65, "EMA, dense map and norms stay whole"
    assert 0.4 < half.activations / whole.activations < 0.8
    assert pieces.parameters == whole.parameters
    assert pieces.activations / whole.activations == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8,x"], "--gpus '8,x': expected numbers such as 8,64,512"),
        (["--gpus", "0"], "expected numbers"),
        (["--activation", "1.5"], "--activation 1.5: a share of tokens, from 0 to 1"),
        (["model.vocab_size=null"], "model.vocab_size is not set and there is no dataset at data.path corpora/pile"),
        (["model.widht=3"], "did you mean 'width'?"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(CONFIGS / "1b.yaml"), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_dense_baseline_is_planned_too(capsys: pytest.CaptureFixture[str]) -> None:
    model = "model={family: llama, layers: 12, width: 512, heads: 8, vocab_size: 32000}"
    assert main(["plan", str(CONFIGS / "1b.yaml"), model, "--gpus", "8", "--gpu", "A100"]) == 0
    assert "at activation 1;" in capsys.readouterr().out


def test_overrides_stand_before_or_after_options(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for line in (["model.layers=3", "--gpus", "8"], ["--gpus", "8", "model.layers=3"], ["--gpus", "8"]):
        assert main(["plan", str(CONFIGS / "125m.yaml"), *line]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_what_is_no_override_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for stray in ("model.layers", "--layers=3"):
        with pytest.raises(SystemExit, match="2"):
            main(["plan", str(CONFIGS / "125m.yaml"), "--gpus", "8", stray])
        assert f"unrecognized arguments: {stray}" in capsys.readouterr().err
