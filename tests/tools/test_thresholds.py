"""One model at other thresholds: more or fewer tokens active, the work counted, the model left as it was."""

import json
from pathlib import Path

import pytest
import torch

from megaboat.cli import main
from megaboat.errors import BadInput
from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from megaboat.model.config import LlamaConfig, SeqBoatConfig
from megaboat.tools.thresholds import biased, curve
from tests.distributed import run_on_ranks
from tests.engine.conftest import dataset_folder, tiny_config
from tests.engine.runs import train_on_rank

__all__ = ["dataset_folder"]


def test_a_bias_counts_in_temperatures() -> None:
    model = build_model(SeqBoatConfig(layers=2, width=16, qk_dim=8, window=4, vocab_size=50), seed=0).eval()
    tokens, docs = torch.randint(0, 50, (2, 40)), Documents.whole(2, 40)
    plain = model(tokens, docs).routings[0]
    with torch.no_grad(), biased(model, 0.25):
        moved = model(tokens, docs).routings[0]
    assert torch.equal(moved.active_XM, plain.margin_XM > -0.25 * plain.log_temperature_M.exp())
    assert torch.equal(model(tokens, docs).routings[0].active_XM, plain.active_XM), "the model is as it was"


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(BadInput, match="a dense model has no threshold"):
        curve(build_model(LlamaConfig(family="llama", layers=1, width=16, heads=2, vocab_size=9), 0), [0.0], dict)


def test_the_command(dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run_on_ranks(train_on_rank, 1, tiny_config(dataset_folder, run, train__steps=3))
    files = ["--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.png"), "--max-tokens", "600"]
    assert main(["eval", str(run), "--activation-bias=-inf,-0.5,0,0.5,inf", *files]) == 0
    assert "of always on" in capsys.readouterr().out
    figures = json.loads((tmp_path / "a.json").read_text())
    points = figures["thresholds"]
    assert [point["bias"] for point in points] == ["-inf", -0.5, 0.0, 0.5, "inf"]
    active = [point["activation"] for point in points]
    assert active == sorted(active)
    assert (active[0], active[-1]) == (0, 1)
    assert points[-1]["of_always_on"] == pytest.approx(1.0)
    assert points[2]["nll"] == figures["overall"]["nll"], "bias 0 is the model itself"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert main(["eval", str(run), "--picture", "x.png"]) == 2
    overlapping = ["--context", "30", "--max-tokens", "600", "--json", str(tmp_path / "b.json")]
    assert main(["eval", str(run), *overlapping]) == 0
    after_30 = json.loads((tmp_path / "b.json").read_text())["overall"]
    assert after_30["tokens"] == figures["overall"]["tokens"]
    assert after_30["nll"] != figures["overall"]["nll"]
    assert main(["eval", str(run), "--context", "5000"]) == 2
    assert "and some must be scored" in capsys.readouterr().err
