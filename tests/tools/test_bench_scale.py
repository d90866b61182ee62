"""`bench scale` on two CPU ranks at toy size; one layout's failure is not the next one's."""

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest
import yaml

from megaboat.cli import main
from megaboat.config import build_config, load_config
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput
from megaboat.tools.bench_ranks import Failed, NoRoom, Spares
from megaboat.tools.bench_scale import Bench, chosen, fitting_layers, search, with_layers
from megaboat.tools.bench_scale_rank import Measured
from megaboat.tools.bench_scale_table import Compared, verdict
from megaboat.tools.plan_layout import configured_bytes
from tests.distributed import CONTEXT

CONFIGS = Path(__file__).parents[2] / "configs"
TREE = {
    "model": {
        "vocab_size": 64,
        "layers": 2,
        "width": 128,
        "qk_dim": 32,
        "heads": 4,
        "window": 8,
        "ffn_dim": 256,
        "ema_order": 2,
    },
    "data": {"seq_len": 32},
    "train": {"global_batch": 4, "micro_batch": 1, "precision": "fp32"},
    "optim": {"warmup": 0.0},
}


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return build_config(RunConfig, TREE, "the test")


def test_every_layout_has_its_peer_on_one_gpu(config: RunConfig) -> None:
    cases = {case.name: case for case in chosen(config, "all")}
    assert list(cases) == ["one", "one, zero1", "one, zero3", "zero1", "zero2", "zero3", "tensor2", "sequence2"]
    for case in cases.values():
        together = case.config.parallel.tensor * case.config.parallel.sequence
        case.config.check_world(case.gpus)
        if case.base is None:
            assert case.gpus == together == 1
            continue
        base = cases[case.base].config
        assert case.config.train.global_batch == 2 * base.train.global_batch, "the same tokens a GPU"
        assert case.config.train.micro_batch == together * base.train.micro_batch
        assert case.config.parallel.zero == base.parallel.zero or case.config.parallel.zero == 2
    assert [case.name for case in chosen(config, "tensor2")] == ["one", "one, zero1", "tensor2"]
    assert chosen(config, "none") == []


def test_what_cannot_be_cut_is_refused_before_anything_starts(config: RunConfig) -> None:
    with pytest.raises(BadInput, match="no zero9; there are zero1, zero2"):
        chosen(config, "zero1,zero9")
    odd = config.model_copy(update={"model": config.model.model_copy(update={"heads": 1})})
    with pytest.raises(BadInput, match="heads 1 is not a multiple of parallel.tensor 2"):
        chosen(odd, "all")


@pytest.mark.parametrize("end", [1, 30, 39, 40, 41, 55, 200])
def test_the_search_finds_the_end_on_both_sides(end: int) -> None:
    tried = []
    low, high = search(lambda layers: tried.append(layers) or layers <= end, 40)
    assert low <= end
    assert high is None or high > end
    assert len(tried) == len(set(tried)) <= 4
    if 36 <= end <= 43:
        assert high is not None
        assert high - low <= 3


def test_the_search_begins_where_the_plan_sees_the_end() -> None:
    config = load_config(RunConfig, CONFIGS / "1b.yaml")
    layers = fitting_layers(config, 2, 3, 20e9)
    bytes_of = [configured_bytes(with_layers(config, 2, 3, layers + more), 2, 0.5) for more in (0, 1)]
    assert bytes_of[0] <= 20e9 < bytes_of[1]


def test_the_verdict_names_the_layout_that_was_planned_worst() -> None:
    found = Measured([1.0], [1.0], 1.0, 0.0, 100, 0.5, 200.0, "GPU")
    on_cpu = dataclasses.replace(found, peak_bytes=None)
    compared = [
        Compared("a", found, 95, 202.0, 1.1),
        Compared("b", found, 102, 199.0, 0.8),
        Compared("c", on_cpu, 500, 200.0, None),
    ]
    assert verdict(compared) == (
        "the plan beside measurement: memory of 2 layouts, at worst -5.0% (a); "
        "operations of 3 layouts, at worst +1.0% (a); time of 2 layouts, at worst -20.0% (b)"
    )
    assert verdict([]).endswith("nothing was measured")


def test_a_budget_ends_before_a_measurement_that_has_no_time(config: RunConfig, tmp_path: Path) -> None:
    bench = Bench(timeout=300, budget=1, json_file=tmp_path / "found.json")
    try:
        found = bench.attempt(chosen(config, "all")[0], steps=1)
    finally:
        bench.close()
    assert str(found) == "left out, the --budget of 1 s is used up"
    assert not bench.compared


def strange(ranks: Ranks, what: str) -> str:
    """One of several ends of a job."""
    if what == "waits" or (what != "well" and ranks.rank == 0):
        time.sleep(600)
    if what == "full":
        raise RuntimeError("CUDA error: out of memory")
    if what == "wrong":
        raise ValueError("no such thing")
    if what == "dead":
        os._exit(9)
    return f"{what} of {ranks.size}"


@pytest.mark.slow
def test_what_becomes_of_a_job_is_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaboat.tools.bench_ranks.AFTERMATH", 0.5)
    monkeypatch.setattr("megaboat.tools.bench_ranks.CONTEXT", CONTEXT)
    spares = Spares(ahead=2)
    try:
        with pytest.raises(NoRoom, match="^RuntimeError: CUDA error: out of memory"):
            spares.run(strange, 2, "full")
        with pytest.raises(Failed, match="no such thing"):
            spares.run(strange, 2, what="wrong")
        with pytest.raises(Failed, match="rank 1: died without a word"):
            spares.run(strange, 2, "dead")
        with pytest.raises(Failed, match="2 of 2 ranks gave no result within 1 s"):
            spares.run(strange, 2, "waits", timeout=1)
        assert spares.run(strange, 2, "well") == "well of 2"
        assert spares.run(strange, 1, "well") == "well of 1"
    finally:
        spares.close()


@pytest.mark.slow
def test_a_rank_has_an_interpreter_of_its_own() -> None:
    assert Spares(ahead=0).run(strange, 1, "well") == "well of 1"


@pytest.mark.slow
def test_layouts_train_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megaboat.tools.bench_ranks.CONTEXT", CONTEXT)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TREE))
    arguments = ["--steps", "1", "--checkpoint", str(tmp_path), "--row", "64", "--json", str(tmp_path / "scale.json")]
    layouts = "zero3,tensor2,sequence2"
    assert main(["bench", "scale", "--layouts", layouts, *arguments, str(tmp_path / "toy.yaml")]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "scale.json").read_text())
    assert list(found) == ["config", "one", "one, zero1", "one, zero3", "zero3", "tensor2", "sequence2", "row of 64"]
    one = found["one"]
    assert one["losses"][0] > one["losses"][-1]
    for name in ("zero3", "tensor2", "sequence2"):
        assert found[name]["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert found[name]["norms"] == pytest.approx(one["norms"], rel=1e-5)
        assert found[name]["activation"] == pytest.approx(one["activation"], abs=1e-6)
    assert found["sequence2"]["flops"] == pytest.approx(one["flops"], rel=1e-6), "pairs over the border count too"
    assert found["tensor2"]["flops"] > 1.05 * one["flops"], "what is whole on both ranks is computed twice"
    assert found["zero3"]["checkpoint"]["bytes"] > 12 * 2 * (2 * 128 * 128)
    assert found["row of 64"]["losses"]
    assert "checkpoints of " in said
    assert "a row of 64 tokens, sequence 2, ZeRO-2, recomputed: " in said
    lines = [line for line in said.splitlines() if line.startswith(tuple(found))]
    assert len(lines) == 6
    offs = {name: abs(figures["flops_off"]) for name, figures in found.items() if name != "config"}
    assert len(offs) == 7
    assert max(offs.values()) < 0.001, offs
    assert "the plan beside measurement: operations of 7 layouts, at worst " in said
