"""Bad steps: left out, named, repeated no more; weights that are lost go back to the checkpoint, or end the run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megaboat.engine.build import open_run
from megaboat.engine.checkpoint import _entry
from megaboat.engine.deepspeed import Engine
from megaboat.engine.guard import LEAST, Guard
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.engine.trainer import Trainer
from megaboat.errors import Diverged
from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from megaboat.model.seqboat import ModelOutput
from tests.distributed import run_on_ranks, start_commands
from tests.engine.conftest import tiny_config, tiny_tree
from tests.engine.runs import metrics, train_on_rank, write_config

LAYOUTS = [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]


def spoil(trainer: Trainer, bad: dict[int, float], rank: int = 0) -> None:
    """From now on the loss of `rank` in the steps of `bad` is multiplied by what stands there."""

    def hook(module: nn.Module, inputs: Any, output: ModelOutput) -> ModelOutput:
        factor = bad.get(trainer.step + 1) if module.training and trainer.ranks.rank == rank else None
        return output if factor is None else output._replace(nll=output.nll * factor)

    trainer.engine.module.register_forward_hook(hook)


def train_spoilt(ranks: Ranks, config: RunConfig, bad: dict[int, float]) -> tuple[str, int]:
    """For `run_on_ranks`: a whole run in which the loss of the last copy of the model is spoilt in some steps."""
    trainer = open_run(config, ranks)
    spoil(trainer, bad, ranks.size - config.parallel.tensor)
    outcome, _ = trainer.fit()
    trainer.ledger.close() if trainer.ledger else None
    return outcome, trainer.step


def ledger(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "data_ledger.jsonl").read_text().splitlines()]


def updated(out: Path) -> dict[int, float]:
    """The losses of the steps that changed the weights."""
    return {line["step"]: line["loss"] for line in metrics(out)}


@pytest.fixture(scope="module")
def undisturbed(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run_on_ranks(train_on_rank, 1, tiny_config(dataset_folder, out))
    return out


@pytest.fixture(scope="module")
def two_left_out(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process; the losses of steps 8 and 9 are not numbers."""
    out = tmp_path_factory.mktemp("two_left_out") / "run"
    config = tiny_config(dataset_folder, out)
    assert run_on_ranks(train_spoilt, 1, config, {8: math.nan, 9: math.inf}) == [("done", 20)]
    return out


def test_bad_steps_are_left_out_and_named(two_left_out: Path, undisturbed: Path) -> None:
    assert [line.pop("skipped", None) for line in ledger(two_left_out)] == [None] * 7 + [
        "the loss is nan",
        "the loss is inf",
    ] + [None] * 11
    assert [line | {"skipped": 0} for line in ledger(two_left_out)] == [
        line | {"skipped": 0} for line in ledger(undisturbed)
    ], "the same tokens in the same steps"
    assert "step 8 left out: the loss is nan; windows 28 to 31 (" in (two_left_out / "log.txt").read_text()
    losses, before = updated(two_left_out), updated(undisturbed)
    assert sorted(losses) == [*range(1, 8), *range(10, 21)]
    assert all(losses[step] == before[step] for step in range(1, 8))
    assert all(math.isfinite(loss) for loss in losses.values())
    assert metrics(two_left_out)[-1]["skipped"] == 2


CUTS = [
    *((size, {"zero": zero}) for size, zero in LAYOUTS),
    (2, {"zero": 0, "tensor": 2}),
    (2, {"zero": 1, "sequence": 2}),
    pytest.param(4, {"zero": 2, "tensor": 2, "sequence": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("size", "parallel"), CUTS)
def test_going_back_is_as_if_the_steps_had_been_left_out(
    two_left_out: Path, dataset_folder: Path, tmp_path: Path, size: int, parallel: dict[str, int]
) -> None:
    """Steps 6 and 7 are done twice, from weights, moments and data of step 5: nothing of the first try is left. In the
    second try, steps 8 and 9 are left out in passing."""
    changes = {f"parallel__{key}": value for key, value in parallel.items()}
    copies = size // parallel.get("tensor", 1) // parallel.get("sequence", 1)
    changes |= {"train__micro_batch": 2 // copies, "train__bad_steps": 2}
    config = tiny_config(dataset_folder, tmp_path / "run", **changes)
    bad = {8: math.nan, 9: math.inf}
    assert run_on_ranks(train_spoilt, size, config, bad) == [("done", 20)] * size
    assert "in 2 steps in a row: going back to" in (tmp_path / "run" / "log.txt").read_text()
    assert ledger(tmp_path / "run") == ledger(two_left_out)
    assert updated(tmp_path / "run") == pytest.approx(updated(two_left_out), rel=1e-5)


def test_a_named_step_is_left_out_by_whoever_repeats_it(two_left_out: Path, dataset_folder: Path) -> None:
    """The run starts again from step 5 with nothing wrong any more: the ledger's word holds."""
    before = updated(two_left_out)
    for folder in (two_left_out / "checkpoints").glob("step-*"):
        state = json.loads((folder / "state.json").read_text())
        assert state["guard"]["updates"] == state["step"] - 2
    for name in ("checkpoints", "metrics.jsonl"):
        (two_left_out / name).rename(two_left_out / f"old-{name}")
    assert run_on_ranks(train_on_rank, 1, tiny_config(dataset_folder, two_left_out)) == [("done", 20)]
    assert updated(two_left_out) == before


def test_a_last_step_that_is_bad_is_not_the_end(dataset_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(dataset_folder, tmp_path / "run", train__steps=7)
    assert run_on_ranks(train_spoilt, 1, config, {7: math.nan}) == [("done", 7)]
    assert "going back to" in (tmp_path / "run" / "log.txt").read_text()
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step-7"


def test_a_bad_last_step_does_not_cost_a_run_without_checkpoints(dataset_folder: Path, tmp_path: Path) -> None:
    """The weights that are saved are those of the step before, as after going back."""
    for name, save_every in (("alone", 0), ("back", 3)):
        config = tiny_config(dataset_folder, tmp_path / name, train__steps=4, train__save_every=save_every)
        assert run_on_ranks(train_spoilt, 1, config, {4: math.nan}) == [("done", 4)]
    alone, back = (
        load_file(tmp_path / name / "checkpoints/step-4/model-00001.safetensors") for name in ("alone", "back")
    )
    assert all(torch.equal(alone[name], back[name]) for name in back)
    assert [line["step"] for line in ledger(tmp_path / "alone") if "skipped" in line] == [4]


def test_a_bad_last_step_is_no_second_try(dataset_folder: Path, tmp_path: Path) -> None:
    """The run has gone back to its only checkpoint before, for steps that it leaves out since."""
    config = tiny_config(dataset_folder, tmp_path / "run", train__steps=9, train__bad_steps=2)
    assert run_on_ranks(train_spoilt, 1, config, dict.fromkeys((6, 7, 9), math.nan)) == [("done", 9)]
    assert [line["step"] for line in ledger(tmp_path / "run") if "skipped" in line] == [6, 7, 9]


def test_a_checkpoint_that_is_no_better_ends_the_run(dataset_folder: Path, tmp_path: Path) -> None:
    """A weight is not a number in the only checkpoint: exit code 4, and a report of what was seen."""
    out = tmp_path / "run"
    run_on_ranks(train_on_rank, 1, tiny_config(dataset_folder, out, train__steps=5))
    folder = out / "checkpoints" / "step-5"
    weights = load_file(folder / "model-00001.safetensors")
    next(iter(weights.values())).flatten()[0] = math.nan
    save_file(weights, folder / "model-00001.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model-00001.safetensors"] = _entry(folder / "model-00001.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    config = write_config(tmp_path / "run.yaml", tiny_tree(dataset_folder, out))
    (command,) = start_commands(1, tmp_path, "train", str(config))
    command.join(120)
    messages = (tmp_path / "rank-0.log").read_text()
    assert command.exitcode == 4, messages
    last = messages.strip().splitlines()[-1]
    assert last.startswith("megaboat train: step 11: the loss is nan, and so in 3 steps in a row, again after")
    assert json.loads((out / "outcome.json").read_text())["outcome"] == "fatal"
    report = (out / "report" / "diverged.txt").read_text()
    assert "optim.lr=0.005 (was 0.01)" in report
    for step in range(6, 12):
        assert f"step {step}: windows {4 * step - 4} to {4 * step - 1} (" in report
    assert (out / "checkpoints" / "latest").read_text().strip() == "step-5", "no checkpoint of bad weights"


def test_a_spike_is_left_out(dataset_folder: Path, tmp_path: Path) -> None:
    spiky = {LEAST + 2: 1e4, LEAST + 4: 2.0}
    for name, limit in (("with", 20.0), ("without", 0.0)):
        changes = {"train__steps": LEAST + 5, "train__spike": limit, "train__save_every": 0}
        config = tiny_config(dataset_folder, tmp_path / name, **changes)
        assert run_on_ranks(train_spoilt, 1, config, spiky) == [("done", LEAST + 5)]
    named = {line["step"]: line["skipped"] for line in ledger(tmp_path / "with") if "skipped" in line}
    assert list(named) == [LEAST + 2]
    assert "is over 20 x the median" in named[LEAST + 2]
    assert not any("skipped" in line for line in ledger(tmp_path / "without"))


def test_guard_counts_rows_of_bad_steps(tmp_path: Path) -> None:
    guard = Guard(RunConfig(), {3: "named before"}, None)
    judged = [guard.judge(step, 0, loss, 1.0) for step, loss in enumerate([1.0, math.nan, 1.0, 1.0, math.nan], 1)]
    assert judged == [None, "the loss is nan", "named before", None, "the loss is nan"]
    assert (guard.updates, guard.streak) == (2, 1)
    assert guard.judge(6, 0, 1.0, -1.0) == "the gradient is not finite"
    assert not guard.must_return(6)
    assert guard.judge(7, 0, math.inf, 1.0)
    assert guard.must_return(7)
    guard.restore({"updates": 2, "norms": [1.0, 1.0]})
    assert guard.judge(5, 0, 1.0, 1.0) == "the loss is nan", "what was bad once stays out"
    assert guard.streak == 0


def skip_between(ranks: Ranks, config: RunConfig, kinds: str) -> list[Tensor]:
    """Weights and moments after a batch for each letter: u updates, s is skipped, o is left out altogether."""
    engine = Engine(build_model(config.model, seed=0), config, ranks)
    tokens = torch.randint(1, 64, (len(kinds), 4, 25), generator=torch.Generator().manual_seed(1))
    for kind, batch in zip(kinds, tokens, strict=True):
        if kind == "o":
            continue
        rows = batch[ranks.rank * 4 // ranks.size : (ranks.rank + 1) * 4 // ranks.size]
        for i, row in enumerate(rows[:, None]):
            engine.backward(engine(row[:, :-1], Documents.whole(1, 24), row[:, 1:]).nll / 24)
            if i + 1 < len(rows):
                engine.next_micro_batch()
        assert 0 < engine.gradient_norm() < math.inf
        if kind == "s":
            engine.skip()
        else:
            engine.step(1e-2)
    return [tensor.clone() for _, tensor in [*engine.weights(), *engine.moments()]]


@pytest.mark.parametrize(
    ("size", "zero", "offload"), [*((*layout, "none") for layout in LAYOUTS), (2, 2, "optimizer"), (2, 3, "optimizer")]
)
def test_a_skipped_step_leaves_no_trace(
    dataset_folder: Path, tmp_path: Path, size: int, zero: int, offload: str
) -> None:
    """Bit for bit: neither in weights and moments, nor in what accumulates gradients over micro-batches."""
    changes = {"parallel__zero": zero, "parallel__offload": offload, "train__micro_batch": 1, "model__vocab_size": 64}
    config = tiny_config(dataset_folder, tmp_path, **changes)
    skipped, left_out = (run_on_ranks(skip_between, size, config, kinds)[0] for kinds in ("ususu", "uouou"))
    for ours, theirs in zip(skipped, left_out, strict=True):
        assert torch.equal(ours, theirs)


def test_diverged_is_what_the_command_line_knows() -> None:
    assert Diverged.exit_code == 4
