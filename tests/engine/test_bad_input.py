"""What a user can get wrong: one clear line, exit code 2 or 3, and nothing written over."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from megaboat.cli import main
from megaboat.config import build_config
from megaboat.data.prepare import Request, prepare
from megaboat.data.spill import PrepareOptions
from megaboat.data.train_tokenizer import train_tokenizer
from megaboat.engine.run_config import RunConfig
from tests.corpus import real_texts, write_jsonl
from tests.distributed import run_on_ranks, start_commands
from tests.engine.conftest import tiny_config, tiny_tree
from tests.engine.runs import ended, losses, train_on_rank, write_config


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one line that the command prints, after its progress bars, before it ends with `code`."""
    assert main(list(arguments)) == code
    lines = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    said = [line for line in lines if line.startswith("megaboat ")]
    assert said == lines[-1:]
    return said[0]


@pytest.fixture
def trained(dataset_folder: Path, tmp_path: Path) -> Path:
    """A run of five steps."""
    out = tmp_path / "run"
    run_on_ranks(train_on_rank, 1, tiny_config(dataset_folder, out, train__steps=5))
    return out


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file but the claim of a process that is gone, which any start may clear away."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "owner.json"]
    return {str(path): path.read_bytes() for path in files}


def test_missing_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_tree(tmp_path / "absent", tmp_path / "run"))
    message = refused(capsys, "train", str(config))
    assert str(tmp_path / "absent") in message
    assert "megaboat data prepare" in message
    assert not (tmp_path / "run").exists()


def test_a_model_that_no_memory_holds(dataset_folder: Path, tmp_path: Path) -> None:
    tree = tiny_tree(dataset_folder, tmp_path / "run", model__vocab_size=1 << 45)
    (command,) = start_commands(1, tmp_path, "train", str(write_config(tmp_path / "run.yaml", tree)))
    last = ended(command, tmp_path, 2).strip().splitlines()[-1]
    assert last.startswith(
        "megaboat train: rank 0: no memory for the model; `megaboat plan` says what fits: a smaller "
    )
    assert not (tmp_path / "run").exists()


def test_no_corpus_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml", {"train": {"out": str(tmp_path / "run")}})
    assert "data.path is not set" in refused(capsys, "train", str(config))


def test_corpus_without_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    out = tmp_path / "tokens"
    message = refused(capsys, "data", "prepare", "--input", str(empty), "--tokenizer", "bytes+eos", "--out", str(out))
    assert "empty.jsonl" in message
    assert not (out / "index.json").exists()


def test_vocabulary_smaller_than_the_shards(
    dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny_tree(dataset_folder, tmp_path / "run", model__vocab_size=100)
    message = refused(capsys, "train", str(write_config(tmp_path / "run.yaml", tree)))
    assert "model.vocab_size 100 is smaller than the vocabulary" in message


def test_vocabulary_larger_than_the_dtype(
    dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(dataset_folder, tmp_path / "tokens")
    index = json.loads((copy / "index.json").read_text())
    index["vocab_size"] = 70_000
    (copy / "index.json").write_text(json.dumps(index))
    config = write_config(tmp_path / "run.yaml", tiny_tree(copy, tmp_path / "run"))
    message = refused(capsys, "train", str(config))
    assert "vocabulary of 70,000" in message
    assert "uint16" in message
    assert not (tmp_path / "run").exists()


def test_rows_that_do_not_fit_the_ranks(
    dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny_tree(dataset_folder, tmp_path / "run", train__micro_batch=3)
    message = refused(capsys, "train", str(write_config(tmp_path / "run.yaml", tree)))
    assert "train.global_batch 4 is not a multiple of 1 ranks x train.micro_batch 3" in message


def test_a_run_of_another_model(trained: Path, dataset_folder: Path) -> None:
    before = snapshot(trained)
    for key, change in (("layers", 3), ("window", 9)):
        config = tiny_config(dataset_folder, trained, train__steps=5, **{f"model__{key}": change})
        with pytest.raises(AssertionError, match=rf"model.{key} was \d+ and is now {change}; train.out holds"):
            run_on_ranks(train_on_rank, 1, config)
    assert snapshot(trained) == before


def test_fewer_steps_than_were_done(trained: Path, dataset_folder: Path) -> None:
    before = snapshot(trained)
    with pytest.raises(AssertionError, match="train.steps 3 is behind the checkpoint of step 5"):
        run_on_ranks(train_on_rank, 1, tiny_config(dataset_folder, trained, train__steps=3))
    assert snapshot(trained) == before


def test_a_tokenizer_that_does_not_match(trained: Path, dataset_folder: Path, tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "other.jsonl", real_texts(20, max_chars=4000))
    train_tokenizer([texts], 400, tmp_path / "other.model")
    prepare(Request({"train": [texts]}, str(tmp_path / "other.model"), tmp_path / "other"))
    before = snapshot(trained)
    tree = tiny_tree(tmp_path / "other", trained, train__steps=10)
    (command,) = start_commands(1, tmp_path, "train", str(write_config(tmp_path / "run.yaml", tree)))
    messages = ended(command, tmp_path, 2)
    line = next(line for line in messages.splitlines() if line.startswith("megaboat train: "))
    assert "tokenizer" in line
    assert snapshot(trained) == before


def test_a_damaged_newest_checkpoint_is_passed_over(dataset_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_on_ranks(train_on_rank, 1, tiny_config(dataset_folder, out, train__steps=10))
    weights = out / "checkpoints" / "step-10" / "model-00001.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    weights.write_bytes(damaged)
    assert run_on_ranks(train_on_rank, 1, tiny_config(dataset_folder, out, train__steps=10)) == [("done", 10)]
    assert weights.read_bytes() != bytes(damaged), "steps 6 to 10 were done again from step 5"


def test_a_flipped_byte_in_a_shard_stops_with_3(dataset_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(dataset_folder, tmp_path / "tokens")
    for shard in copy.rglob("train/*.tar"):
        content = bytearray(shard.read_bytes())
        content[3000] ^= 1
        shard.write_bytes(content)
    tree = tiny_tree(copy, tmp_path / "run", model__calibrate=False)  # which would meet it before there is a run
    (command,) = start_commands(1, tmp_path, "train", str(write_config(tmp_path / "run.yaml", tree)))
    messages = ended(command, tmp_path, 3)
    line = next(line for line in messages.splitlines() if line.startswith("megaboat train: "))
    assert ".tar" in line
    assert "block 0" in line
    assert "byte offset" in line
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["outcome"] == "fatal"


def test_training_goes_on_past_a_damaged_block_as_the_message_says(dataset_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    texts = write_jsonl(tmp_path / "texts.jsonl", real_texts(50, max_chars=6000))
    options = PrepareOptions(block_tokens=5000, val_per_10k=0)
    prepare(Request({"train": [texts]}, str(dataset_folder / "tokenizer.model"), tmp_path / "blocks", options))
    shard = tmp_path / "blocks" / "train" / "lib-00000.tar"
    blocks = np.load(tmp_path / "blocks" / "blocks-train-lib.npy")
    content = bytearray(shard.read_bytes())
    content[int(blocks["offset"][-1]) + 10] ^= 1
    shard.write_bytes(content)
    tree = tiny_tree(tmp_path / "blocks", out, train__steps=40, train__save_every=1, model__calibrate=False)
    with pytest.raises(AssertionError, match="add to data.phases: ") as refusal:
        run_on_ranks(train_on_rank, 2, build_config(RunConfig, tree, "the test"))
    said = str(refusal.value)
    assert f"{shard}: block {len(blocks) - 1}: wrong crc" in said
    before = losses(out)
    assert before, "the damage is not in the first batch"
    phase = yaml.safe_load(said.partition("data.phases: ")[2].splitlines()[0])
    assert phase["from_window"] == 4 * len(before)
    tree["data"]["phases"] = [phase]
    assert run_on_ranks(train_on_rank, 1, build_config(RunConfig, tree, "the test")) == [("done", 40)]
    assert losses(out)[: len(before)] == before


def test_a_missing_shard_stops_with_3_before_anything_is_written(
    dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(dataset_folder, tmp_path / "tokens"))
    (copy / "train" / "lib-00000.tar").unlink()
    config = write_config(tmp_path / "run.yaml", tiny_tree(copy, tmp_path / "run"))
    message = refused(capsys, "train", str(config), code=3)
    assert message == f"megaboat train: {copy}/train/lib-00000.tar: shard is missing; index.json names it"
    assert not (tmp_path / "run").exists()
    (copy / "tokenizer.model").unlink()
    message = refused(capsys, "train", str(config), code=3)
    assert message == f"megaboat train: {copy}/tokenizer.model: tokenizer is missing; index.json names it"
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_a_file(dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    config = write_config(tmp_path / "run.yaml", tiny_tree(dataset_folder, tmp_path / "file"))
    (command,) = start_commands(1, tmp_path, "train", str(config))
    last = ended(command, tmp_path, 2).strip().splitlines()[-1]
    assert last.startswith(f"megaboat train: {tmp_path / 'file'}")
