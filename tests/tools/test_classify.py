"""`megaboat classify`: it learns, it goes on where it stopped, and it refuses another run's folder."""

import json
from pathlib import Path

import pytest

from megaboat.cli import main
from megaboat.config import load_config
from megaboat.errors import BadInput, DamagedData
from megaboat.model.classifier import build_classifier
from megaboat.tools.classify import Classification, ClassifyConfig, learning_rate

CONFIG = Path(__file__).parents[2] / "configs" / "listops.yaml"


def tiny(folder: Path, *more: str) -> list[str]:
    sizes = ["layers=1", "width=32", "qk_dim=16", "value_dim=32", "window=8", "max_length=32"]
    recipe = ["batch=32", "steps=80", "warmup=10", "lr=1e-2", "eval_every=40", f"out={folder / 'run'}"]
    task = [f"folder={folder / 'trees'}", "counts=[400, 60, 60]", "lengths=[3, 10]"]
    return [*(f"model.{size}" for size in sizes), *(f"task.{key}" for key in task), *recipe, *more]


def test_the_shipped_recipe_is_the_published_one() -> None:
    config = load_config(ClassifyConfig, CONFIG)
    assert config == ClassifyConfig()
    assert learning_rate(config, 0) == 1e-7
    assert learning_rate(config, 27_000) == pytest.approx(4e-3)
    assert learning_rate(config, 58_500) == pytest.approx(2e-3)


# Published: 65k, 142k, 149k, 219k, 143k; for sound 293K in all. Our tables of local distances end at the window.
PARAMETERS = {
    "listops": (16, 10, 65_366),
    "text": (256, 2, 140_997),
    "retrieval": (256, 2, 148_743),
    "image": (0, 10, 219_330),
    "pathfinder": (0, 2, 143_042),
    "speech": (0, 10, 35_750),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shipped_model_has_the_published_size(name: str) -> None:
    config = load_config(ClassifyConfig, CONFIG.with_stem(name))
    symbols, classes, count = PARAMETERS[name]
    model = build_classifier(config.model, symbols, classes, 0)
    assert sum(parameter.numel() for parameter in model.blocks[0].parameters()) == count
    assert config.batch % (config.micro_batch or 1) == 0
    assert learning_rate(config, config.warmup) == pytest.approx(config.lr)


def test_the_command_trains_and_says_its_accuracy(tmp_path: Path) -> None:
    assert main(["classify", str(CONFIG), *tiny(tmp_path)]) == 0
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 81))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    last = json.loads((run / "evaluation.jsonl").read_text().splitlines()[-1])
    assert last["best"]["val"] > 0.25, "a tenth by chance"
    assert json.loads((run / "outcome.json").read_text())["outcome"] == "done"
    assert main(["classify", str(CONFIG), *tiny(tmp_path, "lr=2e-2")]) == 2, "another run's folder"
    assert main(["classify", str(CONFIG), *tiny(tmp_path, "task.lengths=[3, 40]", f"task.folder={tmp_path}")]) == 2, (
        "longer than the model's table"
    )


def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path) -> None:
    config = load_config(ClassifyConfig, CONFIG, tiny(tmp_path, "model.dropout=0.2"))
    task = config.task.open()
    calm = Classification(config, task)
    losses = [calm.update()["loss"] for _ in range(16)]  # over the end of an epoch, which has 12.5 batches
    stopped = Classification(config, task)
    parts = [stopped.update()["loss"] for _ in range(7)]
    stopped.save()
    resumed = Classification(config, task)
    assert resumed.step == 7
    other = config.task.model_copy(update={"folder": tmp_path / "other", "seed": 1}).open()
    with pytest.raises(BadInput, match="other examples"):
        Classification(config, other)
    parts += [resumed.update()["loss"] for _ in range(9)]
    assert parts == losses
    file = config.out / "checkpoint.pt"
    for content in (file.read_bytes()[:-100], b"no checkpoint", bytes(range(256))):
        file.write_bytes(content)
        with pytest.raises(DamagedData, match=r"checkpoint.pt is damaged .* remove it to begin again"):
            Classification(config, task)


def test_an_update_in_parts_is_the_whole_one(tmp_path: Path) -> None:
    config = load_config(ClassifyConfig, CONFIG, tiny(tmp_path, "model.dropout=0"))
    task = config.task.open()
    whole, parts = (Classification(config.model_copy(update={"micro_batch": size}), task) for size in (None, 12))
    for _ in range(3):
        first, second = whole.update(), parts.update()
        for key in ("loss", "accuracy", "grad_norm"):
            assert second[key] == pytest.approx(first[key], rel=1e-4), key


def test_pairs_and_pictures_go_through_the_same_command(tmp_path: Path) -> None:
    """Do two words begin with the same letter; are two points joined: each from the task's own kind of file."""
    words = [(f"{a}{i}", f"{b}{i % 7}", a == b) for i in range(30) for a in "pq" for b in "pq"]
    for split, part in (("train", words[:96]), ("eval", words[96:108]), ("test", words[108:])):
        lines = "".join(f"{int(same)}\t{first}\t{second}\n" for first, second, same in part)
        (tmp_path / f"{split}.tsv").write_text(lines)
    sizes = [f"model.{size}" for size in ("layers=1", "width=16", "qk_dim=8", "value_dim=16", "window=8")]
    recipe = [*sizes, "batch=24", "warmup=5", "lr=2e-2", "eval_every=20", "model.dropout=0"]
    pairs = ["task.kind=retrieval", f"task.folder={tmp_path}", f"out={tmp_path / 'pairs'}", "steps=60"]
    config = tmp_path / "config.yaml"
    config.write_text("")
    assert main(["classify", str(config), *recipe, *pairs]) == 0
    last = json.loads((tmp_path / "pairs" / "evaluation.jsonl").read_text().splitlines()[-1])
    assert last["best"]["test"] > 0.9, "half by chance"
    pictures = ["task.kind=pathfinder", "task.size=12", "task.dashes=2", "task.distractors=0", "steps=4"]
    where = ["task.counts=[48, 10, 10]", f"task.folder={tmp_path}", f"out={tmp_path / 'pictures'}"]
    assert main(["classify", str(config), *recipe, *pictures, *where, "eval_every=2"]) == 0
    last = json.loads((tmp_path / "pictures" / "evaluation.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["val_accuracy"] <= 1


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(BadInput, match="window 0 is no chunk for block mega"):
        load_config(ClassifyConfig, CONFIG, ["model.block=mega", "model.window=0"])
    assert load_config(ClassifyConfig, CONFIG.with_stem("text"), ["model.block=mega"]).model.bias == "local"
