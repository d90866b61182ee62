"""`megaboat convert`: what it writes, that it proves itself in another process, what it refuses."""

import argparse
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megaboat.config import build_config, load_config
from megaboat.data.tokenizer import open_tokenizer, train_model
from megaboat.engine.run_config import RunConfig
from megaboat.engine.start import load_weights
from megaboat.errors import BadInput, DamagedData, MegaboatError
from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from megaboat.tools import convert, hf_export
from megaboat.tools.hf_files import Export, write_weights
from megaboat.tools.loading import load_run, newest_checkpoint
from tests.corpus import real_texts
from tests.distributed import run_on_ranks
from tests.engine.runs import metrics, train_on_rank
from tests.tools.hf_runs import LLAMA, SMALL, make_dataset, make_run
from tests.tools.hostile import seal

ARMS = SMALL | {"configurator": "gumbel", "ssm": "s5"}
# Every test but those that say so goes without the other process, which takes seconds.
PROOF = {
    "text": "nothing", "tokens": 0, "largest_logit_difference": "0", "decisions": 0, "greedy_tokens": 0,
    "tokenizer_ids": 0,
}  # fmt: skip


def command(*arguments: str | Path) -> int:
    """What the command line does after parsing the command's name."""
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    try:
        return convert.run(parser.parse_args([str(argument) for argument in arguments])) or 0
    except MegaboatError as error:
        print(f"megaboat convert: {error}", file=sys.stderr)
        return error.exit_code


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run_folder(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "boat", dataset, SMALL)


@pytest.fixture(scope="module")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "boat"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_export.hf_proof, "prove", lambda *_: PROOF)
        assert command("to-hf", run_folder, "--out", out) == 0
    return out


@pytest.fixture
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_export.hf_proof, "prove", lambda *_: PROOF)


def hashes(folder: Path, pattern: str = "*") -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob(pattern)}


@pytest.mark.parametrize("model", [SMALL, ARMS, LLAMA], ids=["seqboat", "arms", "llama"])
def test_an_export_proves_itself_in_another_process(
    model: dict, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run with spaces", dataset, model)
    (tmp_path / "out.tmp").mkdir()  # somebody's
    assert command("to-hf", run, "--out", tmp_path / "out", "--license", "apache-2.0") == 0
    said = capsys.readouterr().out
    assert "proved in a process without megaboat on the validation split: 4,096 tokens" in said
    assert ("24,576 decisions" in said) == (model is not LLAMA)
    sizes = json.loads((tmp_path / "out" / "config.json").read_text())
    assert sizes["tie_word_embeddings"] == (model is not LLAMA)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "| training tokens | 384 (3 steps) |" in card
    assert {path.name for path in tmp_path.iterdir()} == {"run with spaces", "out", "out.tmp"}


def test_an_export_that_does_something_else_is_removed(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = hf_export.modeling_code()
    assert "EPS = 1e-5" in code
    monkeypatch.setattr(hf_export, "modeling_code", lambda: code.replace("EPS = 1e-5", "EPS = 2e-5"))
    assert command("to-hf", run_folder, "--out", tmp_path / "out") == 3
    assert re.search(r"the export (gives logits|decides otherwise).* nothing was written\n$", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_weights_are_the_same_bytes_every_time_and_in_any_shards(
    run_folder: Path, exported: Path, tmp_path: Path
) -> None:
    checkpoint = newest_checkpoint(run_folder)
    for name, limit in (("one", 1 << 30), ("again", 1 << 30), ("many", 20_000)):
        (tmp_path / name).mkdir()
        write_weights(tmp_path / name, checkpoint.model(), checkpoint.config, limit)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "again")
    assert hashes(tmp_path / "one", "*.safetensors") == hashes(exported, "*.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in checkpoint.model().values())
    assert "model.embedding.weight" in index["weight_map"]
    assert "model.head.weight" not in index["weight_map"], "tied"


def test_an_export_loads_as_the_run(run_folder: Path, exported: Path) -> None:
    run, export = load_run(run_folder), load_run(exported)
    tokens = torch.tensor([run.tokenizer.encode(real_texts(1)[0])[:200].tolist()])
    assert run.tokenizer.content_id == export.tokenizer.content_id
    with torch.no_grad():
        a, b = (one.model(tokens, Documents.whole(1, 200)).hidden_BTD for one in (run, export))
    assert torch.equal(a, b)
    assert export.config == run.config


@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize("model", [SMALL, LLAMA], ids=["seqboat", "llama"])
def test_there_and_back_is_the_same_bytes(model: dict, dataset: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", dataset, model)
    assert command("to-hf", run, "--out", tmp_path / "one") == 0
    assert command("from-hf", tmp_path / "one", "--out", tmp_path / "back") == 0
    assert command("to-hf", tmp_path / "back", "--out", tmp_path / "two") == 0
    one, two = hashes(tmp_path / "one"), hashes(tmp_path / "two")
    differing = {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}
    assert differing <= {"README.md", "megaboat.json", "megaboat.yaml"}, "the name of the run folder is in these"
    first, back = newest_checkpoint(run), newest_checkpoint(tmp_path / "back")
    assert first.model().keys() == back.model().keys()
    assert all(torch.equal(tensor, back.model()[name]) for name, tensor in first.model().items())
    assert back.state == first.state
    moments = back.optimizer()
    assert not any(tensor.any() for tensor in moments.values())
    assert len(moments) == 2 * len(list(load_run(run).model.parameters()))


def test_a_llama_whose_embedding_was_not_multiplied_is_refused() -> None:
    model = build_model(build_config(RunConfig, {"model": LLAMA | {"vocab_size": 9}}, "the test").model, 0)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors["body.embed_tokens.weight"] = tensors.pop("embedding.weight")  # where it was then
    with pytest.raises(BadInput, match="train.out holds a run of another model"):
        load_weights(model, tensors, "an old run")


@pytest.mark.slow
@pytest.mark.usefixtures("unproved")
def test_training_goes_on_from_an_export(dataset: Path, tmp_path: Path) -> None:
    train = {
        "steps": 4,
        "global_batch": 2,
        "micro_batch": 2,
        "precision": "fp32",
        "eval_every": 0,
        "tensorboard": False,
    }
    tree = {"model": SMALL, "data": {"path": str(dataset), "seq_len": 64}}
    first = build_config(RunConfig, tree | {"train": train | {"out": str(tmp_path / "run")}}, "the test")
    assert run_on_ranks(train_on_rank, 1, first) == [("done", 4)]
    assert command("to-hf", tmp_path / "run", "--out", tmp_path / "out") == 0
    assert "| training tokens | 512 (4 steps) |" in (tmp_path / "out" / "README.md").read_text()
    assert command("from-hf", tmp_path / "out", "--out", tmp_path / "more") == 0
    second = load_config(RunConfig, tmp_path / "more" / "config.yaml", ["train.steps=6"])
    assert second.train.out == tmp_path / "more"
    assert run_on_ranks(train_on_rank, 1, second) == [("done", 6)]
    assert [line["step"] for line in metrics(tmp_path / "more")] == [5, 6]


@pytest.mark.usefixtures("unproved")
def test_an_output_in_use_is_kept_unless_forced(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert command("to-hf", run_folder, "--out", out) == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]
    assert command("to-hf", run_folder, "--out", out, "--force") == 2, "it is not an export"
    assert (out / "mine.txt").read_text() == "precious"
    (out / "mine.txt").rename(out / "megaboat.json")
    assert command("to-hf", run_folder, "--out", out) == 2
    assert command("to-hf", run_folder, "--out", out, "--force") == 0
    assert load_run(out)


def cut(name: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (path,) = folder.rglob(name)
        path.write_bytes(path.read_bytes()[:-8])

    return damage


def newer(name: str, format: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (path,) = folder.rglob(name)
        path.write_text(path.read_text().replace(f"{format}/1", f"{format}/2"))

    return damage


def sealed(damage: Callable[[Path], object]) -> Callable[[Path], object]:
    """The checkpoint's manifest knows of it."""

    def damage_and_seal(folder: Path) -> None:
        damage(folder)
        seal(next(folder.rglob("manifest.json")).parent)

    return damage_and_seal


def append(path: Path) -> None:
    path.write_text(path.read_text() + "\n")


def other_tokenizer(folder: Path) -> None:
    lines = [line for text in real_texts(5) for line in text.splitlines() if len(line) < 1000]
    (folder / "tokenizer.model").write_bytes(train_model(lines, 450, "bpe", threads=1))


def written(name: str, text: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (path,) = folder.rglob(name)
        path.write_text(text)

    return damage


def forgotten(key: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / "megaboat.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))

    return damage


def somebody_elses(folder: Path) -> None:
    """An export of another trainer: everything that transformers reads, and nothing of ours."""
    (folder / "megaboat.json").unlink()
    (folder / "megaboat.yaml").unlink()


RUNS = {
    "an empty folder": (lambda folder: shutil.rmtree(folder) or folder.mkdir(), 2, "neither a run nor an export"),
    "no folder": (shutil.rmtree, 2, "no such folder"),
    "no checkpoint yet": (lambda folder: shutil.rmtree(folder / "checkpoints"), 2, "an empty or unfinished run"),
    "cut weights": (cut("model-00001.safetensors"), 3, "size or sha256 differs"),
    "cut state": (cut("state.json"), 3, "not JSON"),
    "a newer format": (
        sealed(newer("state.json", "megaboat-checkpoint")),
        2,
        "written in format 'megaboat-checkpoint/2'",
    ),
    "a format that is damaged": (newer("state.json", "megaboat-checkpoint"), 3, "size or sha256 differs"),
    "a list for a state": (sealed(written("state.json", "[1, 2]")), 2, "written in format None"),
    "no manifest": (lambda folder: next(folder.rglob("manifest.json")).unlink(), 3, "cannot be read"),
    "another config": (lambda folder: append(next(folder.rglob("step-3/config.yaml"))), 3, "size or sha256 differs"),
    "another tokenizer": (other_tokenizer, 3, "but the model was trained with"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), 3, "missing; the model was trained with"),
}
EXPORTS = {
    "an empty folder": (lambda folder: shutil.rmtree(folder) or folder.mkdir(), 2, "no megaboat.json"),
    "no folder": (shutil.rmtree, 2, "no megaboat.json"),
    "cut weights": (cut("model.safetensors"), 3, "not as written"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), 3, "not as written"),
    "cut record": (cut("megaboat.json"), 3, "not JSON"),
    "a newer format": (newer("megaboat.json", "megaboat-export"), 2, "exported in format 'megaboat-export/2'"),
    "another tokenizer": (other_tokenizer, 3, "not as written"),
    "somebody else's export": (somebody_elses, 2, "expected a folder that `megaboat convert to-hf` wrote"),
    "a list for a record": (written("megaboat.json", "[]"), 2, "exported in format None"),
    "a record without files": (forgotten("files"), 3, "'files' is missing"),
    "a record without state": (forgotten("state"), 3, "'state' is missing"),
    "other sizes": (lambda folder: append(folder / "config.json"), 3, "not as written"),
}


@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize("case", RUNS, ids=RUNS)
def test_a_run_that_is_not_sound_is_refused(
    case: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(case, RUNS, "to-hf", run_folder, tmp_path, capsys)


@pytest.mark.parametrize("case", EXPORTS, ids=EXPORTS)
def test_an_export_that_is_not_sound_is_refused(
    case: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(case, EXPORTS, "from-hf", exported, tmp_path, capsys)


def assert_refused(
    case: str, table: dict, action: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, code, reason = table[case]
    folder = Path(shutil.copytree(sound, tmp_path / "in" / "it"))
    damage(folder)
    assert command(action, folder, "--out", tmp_path / "out" / "it") == code
    complaint = capsys.readouterr().err
    assert reason in complaint
    assert complaint.count("\n") == 1
    assert not (tmp_path / "out").exists(), "nothing was written"


@pytest.mark.parametrize("size", ["0", "nan", "inf"])
def test_a_size_that_is_none_is_refused(
    size: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("to-hf", run_folder, "--out", tmp_path / "out", "--shard-gb", size) == 2
    assert "give a size above 0" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["absent.txt", "empty.txt"])
def test_a_text_that_proves_nothing_is_refused(
    text: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    before = sorted(tmp_path.iterdir())
    assert command("to-hf", run_folder, "--out", tmp_path / "out", "--text", tmp_path / text) == 2
    assert text in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_cut_after_sealing_is_named(exported: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    (copy / "README.md").write_text("mine")
    Export(copy).verify()
    (copy / "modeling_seqboat.py").write_text("import os")
    with pytest.raises(DamagedData, match=r"modeling_seqboat\.py: not as written"):
        Export(copy).verify()


def test_byte_models_need_no_tokenizer_file(tmp_path: Path, unproved: None, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", None, SMALL, tokenizer="bytes+eos")
    assert command("to-hf", run, "--out", tmp_path / "out") == 0
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    assert load_run(tmp_path / "out").tokenizer is open_tokenizer("bytes+eos")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 256
