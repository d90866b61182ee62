"""`megaboat listops`: it learns, it goes on where it stopped, and it refuses another run's folder."""

import json
from pathlib import Path

import pytest

from megaboat.cli import main
from megaboat.config import load_config
from megaboat.data.listops import make_listops, open_listops
from megaboat.errors import DamagedData
from megaboat.tools.listops import Classification, ListOpsConfig, learning_rate

CONFIG = Path(__file__).parents[2] / "configs" / "listops.yaml"


def tiny(folder: Path, *more: str) -> list[str]:
    sizes = ["layers=1", "width=32", "qk_dim=16", "value_dim=32", "window=8", "max_length=32"]
    task = ["trees=[400, 60, 60]", "lengths=[3, 10]", "batch=32", "steps=80", "warmup=10", "lr=1e-2", "eval_every=40"]
    where = [f"data={folder / 'trees'}", f"out={folder / 'run'}"]
    return [*(f"model.{size}" for size in sizes), *task, *where, *more]


def test_the_shipped_recipe_is_the_published_one() -> None:
    config = load_config(ListOpsConfig, CONFIG)
    assert config == ListOpsConfig()
    assert learning_rate(config, 0) == 1e-7
    assert learning_rate(config, 27_000) == pytest.approx(4e-3)
    assert learning_rate(config, 58_500) == pytest.approx(2e-3)


def test_the_command_trains_and_says_its_accuracy(tmp_path: Path) -> None:
    assert main(["listops", str(CONFIG), *tiny(tmp_path)]) == 0
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 81))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    last = json.loads((run / "evaluation.jsonl").read_text().splitlines()[-1])
    assert last["best"]["val"] > 0.25, "a tenth by chance"
    assert json.loads((run / "outcome.json").read_text())["outcome"] == "done"
    assert main(["listops", str(CONFIG), *tiny(tmp_path, "lr=2e-2")]) == 2, "another run's folder"
    assert main(["listops", str(CONFIG), *tiny(tmp_path, "lengths=[3, 40]")]) == 2, "longer than the model's table"


def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path) -> None:
    config = load_config(ListOpsConfig, CONFIG, tiny(tmp_path, "model.dropout=0.2"))
    make_listops(config.data, config.trees, config.lengths, config.data_seed)
    splits = open_listops(config.data)
    calm = Classification(config, splits)
    losses = [calm.update()["loss"] for _ in range(16)]  # over the end of an epoch, which has 12.5 batches
    stopped = Classification(config, splits)
    parts = [stopped.update()["loss"] for _ in range(7)]
    stopped.save()
    resumed = Classification(config, splits)
    assert resumed.step == 7
    parts += [resumed.update()["loss"] for _ in range(9)]
    assert parts == losses
    file = config.out / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DamagedData, match=r"checkpoint.pt is damaged .* remove it to begin again"):
        Classification(config, splits)
