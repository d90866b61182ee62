"""Whole runs: trained, killed, resumed elsewhere, asked to stop; each compared with an undisturbed one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaboat.data.dataset import open_dataset
from megaboat.data.prepare import Request, prepare
from megaboat.data.spill import PrepareOptions
from tests.corpus import real_texts, write_jsonl
from tests.distributed import run_on_ranks, start_commands
from tests.engine.conftest import tiny_config, tiny_tree
from tests.engine.runs import ended, losses, metrics, train_on_rank, wait_for_step, wait_until, write_config

LONG = 100


@pytest.fixture(scope="module")
def undisturbed(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    config = tiny_config(dataset_folder, out, train__tensorboard=True)
    assert run_on_ranks(train_on_rank, 1, config) == [("done", 20)]
    return out


def evaluations(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_folder(undisturbed: Path) -> None:
    assert (undisturbed / "checkpoints" / "latest").read_text().strip() == "step-20"
    assert sorted(path.name for path in (undisturbed / "checkpoints").glob("step-*")) == ["step-15", "step-20"]
    assert {"config.yaml", "metrics.jsonl", "evaluation.jsonl", "data_ledger.jsonl", "tokenizer.model"} <= {
        path.name for path in undisturbed.iterdir()
    }
    line = metrics(undisturbed)[-1]
    assert line["tokens"] == 20 * 4 * 32
    assert len(line["activation_ratio"]) == 2
    assert line["mfu"] is None, "no device with a known peak ran this"
    assert losses(undisturbed)[-1] < losses(undisturbed)[0] - 0.5, "twenty steps lower the loss of any sound trainer"
    evaluation, last = evaluations(undisturbed)
    assert (evaluation["split"], last["split"]) == ("val", "test")
    assert set(evaluation["domains"]) == {"lib", "other-x"}
    assert evaluation["overall"]["tokens"] == sum(domain["tokens"] for domain in evaluation["domains"].values())


def test_tensorboard_holds_the_same_curve(undisturbed: Path) -> None:
    events = EventAccumulator(str(undisturbed / "tensorboard"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert curve == [(line["step"], pytest.approx(line["loss"])) for line in metrics(undisturbed)]
    assert {"activation/layer_00", "activation/layer_01", "bits_per_byte/overall"} <= set(events.Tags()["scalars"])


def test_tensorboard_shows_the_pictures(dataset_folder: Path, tmp_path: Path) -> None:
    tree = tiny_tree(dataset_folder, tmp_path / "run", train__steps=3, train__tensorboard=True)
    (command,) = start_commands(1, tmp_path, "train", str(write_config(tmp_path / "run.yaml", tree)))
    ended(command, tmp_path)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"report/loss", "report/activation_by_step", "report/activation_by_domain"} <= set(events.Tags()["images"])


@pytest.mark.parametrize(
    ("size", "zero", "tensor"), [(2, 1, 1), (2, 3, 1), (4, 2, 2)], ids=["2xzero1", "2xzero3", "2xtensor2-zero2"]
)
def test_more_ranks_give_the_same_run(
    undisturbed: Path, dataset_folder: Path, tmp_path: Path, size: int, zero: int, tensor: int
) -> None:
    layout = {"train__micro_batch": 1, "parallel__zero": zero, "parallel__tensor": tensor}
    config = tiny_config(dataset_folder, tmp_path / "run", **layout)
    assert run_on_ranks(train_on_rank, size, config) == [("done", 20)] * size
    assert losses(tmp_path / "run") == pytest.approx(losses(undisturbed), rel=1e-5)
    ledgers = [(out / "data_ledger.jsonl").read_text() for out in (undisturbed, tmp_path / "run")]
    assert ledgers[0] == ledgers[1]
    for one, other in zip(evaluations(undisturbed), evaluations(tmp_path / "run"), strict=True):
        assert other["overall"]["nll"] == pytest.approx(one["overall"]["nll"], rel=1e-5)


def test_resumes_at_another_layout(tmp_path: Path) -> None:
    """One undisturbed curve on the same windows, whatever ranks share: data, the model, rows, ZeRO's states, and where
    the optimizer lies."""
    texts = write_jsonl(tmp_path / "texts.jsonl", real_texts(5, max_chars=6000))
    prepare(Request({"train": [texts]}, "bytes+eos", tmp_path / "tokens", PrepareOptions(val_per_10k=0)))
    # The only schedule that does not know the last step; heads and a vocabulary for four ranks a copy.
    same = {"optim__schedule": "constant", "optim__warmup": 0.0, "model__heads": 4, "model__vocab_size": 260}
    layouts = (
        (8, 2, 2, 1, 1, "none"),
        (12, 1, 1, 1, 3, "optimizer"),
        (15, 4, 1, 1, 2, "none"),
        (18, 1, 4, 1, 1, "optimizer"),
        (20, 1, 1, 2, 2, "none"),
    )
    for until, data, tensor, sequence, zero, offload in layouts:
        parallel = {"parallel__zero": zero, "parallel__tensor": tensor, "parallel__sequence": sequence}
        parallel["parallel__offload"] = offload
        changes = same | parallel | {"train__steps": until, "train__micro_batch": 1}
        size = data * tensor * sequence
        config = tiny_config(tmp_path / "tokens", tmp_path / "moved", **changes)
        assert run_on_ranks(train_on_rank, size, config) == [("done", until)] * size
    run_on_ranks(train_on_rank, 1, tiny_config(tmp_path / "tokens", tmp_path / "whole", **same))
    moved, whole = tmp_path / "moved", tmp_path / "whole"
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-5)
    assert (moved / "data_ledger.jsonl").read_text() == (whole / "data_ledger.jsonl").read_text()


def first_windows(out: Path) -> list[int]:
    lines = (out / "data_ledger.jsonl").read_text().splitlines()
    return [json.loads(line)["first_window"] for line in lines]


def test_a_run_that_starts_again_with_other_windows(dataset_folder: Path, tmp_path: Path) -> None:
    """The ledger does not hold them to those of an attempt that was killed before its first checkpoint."""
    out = tmp_path / "run"
    for batch in (8, 4):
        config = tiny_config(dataset_folder, out, train__steps=2, train__global_batch=batch)
        assert run_on_ranks(train_on_rank, 1, config) == [("done", 2)]
        shutil.rmtree(out / "checkpoints")
    assert first_windows(out) == [0, 4]


@pytest.mark.slow
def test_a_batch_that_was_tried_and_given_up(dataset_folder: Path, tmp_path: Path) -> None:
    """Steps with another batch stand in the ledger behind the checkpoint that the run goes back to."""
    out = tmp_path / "run"
    for steps, batch in ((2, 4), (3, 8), (4, 4)):
        config = tiny_config(dataset_folder, out, train__steps=steps, train__global_batch=batch)
        assert run_on_ranks(train_on_rank, 1, config) == [("done", steps)]
        shutil.rmtree(out / "checkpoints" / "step-3", ignore_errors=True)  # as if it had been killed before
    assert first_windows(out) == [0, 4, 8, 12]


def test_epochs_are_counted_by_what_was_read(dataset_folder: Path, tmp_path: Path) -> None:
    """20 windows in five steps, then 40 in one: 60 are read, though six times 40 would be 240."""
    dataset = open_dataset(dataset_folder)
    epoch = sum(dataset.source("train", name).n_tokens // 32 for name in dataset.splits["train"])
    changes = {"optim__schedule": "constant", "data__max_epochs": 120 / epoch}
    for steps, batch in ((5, 4), (6, 40)):
        config = tiny_config(dataset_folder, tmp_path / "run", train__steps=steps, train__global_batch=batch, **changes)
        assert run_on_ranks(train_on_rank, 1, config) == [("done", steps)]


def test_contiguous_rows_of_a_small_corpus_are_enough_to_calibrate_on(tmp_path: Path) -> None:
    """The calibration would like 128 rows, of which there are fewer."""
    texts = write_jsonl(tmp_path / "texts.jsonl", real_texts(5, max_chars=2000), ("Lib",))
    prepare(Request({"train": [texts]}, "bytes+eos", tmp_path / "tokens", PrepareOptions(val_per_10k=0)))
    changes = {"data__shuffle": "contiguous", "data__seq_len": 256, "train__steps": 2}
    config = tiny_config(tmp_path / "tokens", tmp_path / "run", **changes)
    assert run_on_ranks(train_on_rank, 1, config) == [("done", 2)]


@pytest.fixture(scope="module")
def long_run(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of so many steps that one like it is surely caught on its way."""
    out = tmp_path_factory.mktemp("long") / "run"
    run_on_ranks(train_on_rank, 1, tiny_config(dataset_folder, out, train__steps=LONG))
    return out


def test_kill_9_and_the_same_command_again(long_run: Path, dataset_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", tiny_tree(dataset_folder, out, train__steps=LONG))
    (killed,) = start_commands(1, tmp_path, "train", str(config))
    wait_for_step(out, 7, killed)
    wait_until((out / "checkpoints" / "latest").is_file, killed)  # it is written beside the training
    killed.kill()
    killed.join()
    assert not (out / "outcome.json").exists(), "the run was over before it was killed"
    (again,) = start_commands(1, tmp_path, "train", str(config))
    assert "resumed" in ended(again, tmp_path)
    assert losses(out) == losses(long_run)
    assert json.loads((out / "outcome.json").read_text())["outcome"] == "done"


def test_sigterm_saves_and_asks_to_be_requeued(long_run: Path, dataset_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", tiny_tree(dataset_folder, out, train__save_every=0, train__steps=LONG))
    (stopped,) = start_commands(1, tmp_path, "train", str(config))
    wait_for_step(out, 4, stopped)
    stopped.terminate()
    ended(stopped, tmp_path)
    outcome = json.loads((out / "outcome.json").read_text())
    assert outcome["outcome"] == "requeue"
    assert "SIGTERM" in outcome["reason"]
    assert (out / "checkpoints" / "latest").read_text().strip() == f"step-{outcome['step']}"
    assert run_on_ranks(train_on_rank, 1, tiny_config(dataset_folder, out, train__steps=LONG)) == [("done", LONG)]
    assert losses(out) == losses(long_run)


def test_shorter_rows_are_accumulated_by_windows(dataset_folder: Path, tmp_path: Path) -> None:
    """micro_batch counts windows: with two rows in each, an optimizer step is still an optimizer step."""
    for micro_batch in (4, 1):
        config = tiny_config(
            dataset_folder,
            tmp_path / str(micro_batch),
            data__row_len=16,
            train__micro_batch=micro_batch,
            train__steps=6,
        )
        run_on_ranks(train_on_rank, 1, config)
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), rel=1e-5)


def test_a_dataset_without_held_out_text_trains(dataset_folder: Path, tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", real_texts(5, max_chars=6000))
    request = Request({"train": [texts]}, "bytes+eos", tmp_path / "tokens", PrepareOptions(val_per_10k=0))
    prepare(request)
    config = tiny_config(tmp_path / "tokens", tmp_path / "run", train__steps=3)
    assert run_on_ranks(train_on_rank, 1, config) == [("done", 3)]


def test_a_run_that_diverges_says_so(dataset_folder: Path, tmp_path: Path) -> None:
    tree = tiny_tree(dataset_folder, tmp_path / "run", optim__lr=1e30, optim__warmup=0.0)
    (command,) = start_commands(1, tmp_path, "train", str(write_config(tmp_path / "run.yaml", tree)))
    ended(command, tmp_path, 4)
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["outcome"] == "fatal"
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
