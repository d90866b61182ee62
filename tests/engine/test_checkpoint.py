"""The folder of checkpoints: what is kept, what is cleared away, what is refused."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megaboat.config import build_config
from megaboat.engine import checkpoint
from megaboat.engine.checkpoint import (
    CheckpointWriter,
    NotSaved,
    committed,
    find_checkpoint,
    save_checkpoint,
)
from megaboat.engine.hooks import JsonLines
from megaboat.engine.pinned import HostCopies, free_memory
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput, DamagedData
from megaboat.log import get_logger
from tests.distributed import run_on_ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def save(root: Path, step: int, keep: int = 2) -> Path:
    named = [("weight", torch.full((3,), float(step)))]
    config = build_config(RunConfig, {}, "the test")
    return save_checkpoint(root, named, [("exp_avg.weight", named[0][1])], {"step": step}, config, keep, ALONE)


def damage(folder: Path) -> None:
    path = folder / "model-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


def names(root: Path) -> list[str]:
    return [path.name for path in committed(root)]


def test_tensors_and_state_come_back(tmp_path: Path) -> None:
    save(tmp_path, 7)
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.state["step"] == 7
    assert dict(found.model())["weight"].tolist() == [7.0] * 3
    assert dict(found.optimizer())["exp_avg.weight"].tolist() == [7.0] * 3
    assert found.config == build_config(RunConfig, {}, "the test")
    assert (tmp_path / "latest").read_text() == "step-7\n"


def test_the_last_ones_are_kept_and_abandoned_writes_cleared(tmp_path: Path) -> None:
    (tmp_path / "step-3.tmp").mkdir()
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-10", "step-15"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_damaged_one_is_not_counted_among_the_kept(tmp_path: Path) -> None:
    for step in (100, 200):
        save(tmp_path, step)
    damage(tmp_path / "step-200")
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.folder.name == "step-100"
    save(tmp_path, 150, keep=1)
    assert names(tmp_path) == ["step-150"]


def test_nothing_whole_is_refused_rather_than_started_again(tmp_path: Path) -> None:
    damage(save(tmp_path, 5))
    with pytest.raises(DamagedData, match="none of its 1 checkpoints is whole"):
        find_checkpoint(tmp_path)


def test_another_format_is_refused_however_sound_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5)
    monkeypatch.setattr(checkpoint, "FORMAT", "megaboat-checkpoint/9")
    save(tmp_path, 10)
    monkeypatch.undo()
    with pytest.raises(BadInput, match="step-10: written in format 'megaboat-checkpoint/9'"):
        find_checkpoint(tmp_path)


def test_a_flipped_byte_in_the_format_is_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_logger(), "propagate", True)  # setup_logging, perhaps called by other tests, ends it
    save(tmp_path, 5)
    path = save(tmp_path, 10) / "state.json"
    sound = path.read_bytes()
    line = next(line for line in sound.splitlines(keepends=True) if b"format" in line)
    start = sound.index(line)
    for place in range(start, start + len(line)):
        for flip in (0x01, 0x80):  # to another character, and to none
            caplog.clear()
            path.write_bytes(sound[:place] + bytes([sound[place] ^ flip]) + sound[place + 1 :])
            found = find_checkpoint(tmp_path)
            assert found is not None
            assert found.folder.name == "step-5", (place, flip)
            (said,) = dict.fromkeys(caplog.messages)  # once or twice, as the logger was set up before
            assert said.startswith(str(path)), (place, flip)
            assert said.endswith("trying the checkpoint before it"), (place, flip)


def test_a_crashed_machine_does_not_block_the_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\0\0\0\0\n{"step": 2}\n{"step": 3}\n{"ste')
    hook = JsonLines(tmp_path)
    hook.on_start(2, 10)
    hook.on_step({"step": 3, "again": True})
    hook.on_end()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The owner is asked when the write begins and when it is committed: here the second answer is long in coming."""
    asked, may_commit = [], threading.Event()

    def check_owner() -> None:
        asked.append(threading.current_thread().name)
        assert len(asked) == 1 or may_commit.wait(60)

    writer = CheckpointWriter(tmp_path, build_config(RunConfig, {}, "the test"), 2, ALONE, check_owner)
    weight = torch.zeros(3)
    folder = writer.save([("weight", weight)], [], {"step": 1})
    weight.fill_(7)
    assert not folder.exists()
    may_commit.set()
    writer.wait()
    assert asked == ["MainThread", "checkpoint"]
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert dict(found.model())["weight"].tolist() == [0.0] * 3, "steps after the save reached the checkpoint"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "manifest.json",
        "model-00001.safetensors",
        "state.json",
    ]


def test_a_write_that_failed_is_raised_by_the_next_and_commits_nothing(tmp_path: Path) -> None:
    owners = iter([None, BadInput("another attempt owns the folder")])

    def check_owner() -> None:
        answer = next(owners)
        if answer is not None:
            raise answer

    writer = CheckpointWriter(tmp_path, build_config(RunConfig, {}, "the test"), 2, ALONE, check_owner)
    writer.save([("weight", torch.zeros(3))], [], {"step": 1})
    with pytest.raises(BadInput, match="another attempt"):
        writer.save([("weight", torch.zeros(3))], [], {"step": 2})
    assert names(tmp_path) == []


def write_on_two(ranks: Ranks, root: Path, broken_rank: int | None) -> str:
    """Save two files, one a rank; on `broken_rank` a folder stands where the file should. Returns the error."""
    checkpoint.FILE_BYTES = 1
    writer = CheckpointWriter(root, build_config(RunConfig, {}, "the test"), 2, ranks)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        if ranks.rank == broken_rank:
            (root / "step-1.tmp" / "model-00002.safetensors").mkdir()
        yield from ((name, torch.full((2,), float(ord(name)))) for name in "ab")

    writer.save(tensors(), [], {"step": 1})
    try:
        writer.wait()
    except NotSaved as error:
        return str(error)
    return ""


def test_what_is_prepared_is_what_will_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """By tensors without data, file by file and rank by rank."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100)
    tensors = [(f"t{n}", torch.full((n,), float(n))) for n in range(30)]
    outlines = [(name, tensor.to("meta")) for name, tensor in tensors]
    dealt = []
    for rank in (0, 1):
        ranks = Ranks(rank, 2, torch.device("cpu"))
        saved = [(file, name, tensor.nbytes) for file, name, tensor in checkpoint._dealt("model", tensors, ranks)]
        assert saved == [(file, name, t.nbytes) for file, name, t in checkpoint._dealt("model", outlines, ranks)]
        dealt += [name for _, name, _ in saved]
    assert sorted(dealt) == sorted(name for name, _ in tensors)


@pytest.mark.parametrize("size", [1 << 50, 8])
def test_a_host_that_pins_nothing_still_copies(size: int, caplog: pytest.LogCaptureFixture) -> None:
    """Too small, or, as here, without a GPU's driver."""
    if torch.cuda.is_available() and size == 8:
        pytest.skip("this host pins memory")
    copies = HostCopies()
    with caplog.at_level("WARNING", logger="megaboat"):
        copies.prepare([size], Ranks(0, 1, torch.device("cuda")))
        copies.settle()
    assert not copies.pins
    assert [record.getMessage() for record in caplog.records if "no pinned memory" in record.getMessage()]
    tensor = torch.arange(3)
    copy = copies.copy(tensor)
    tensor.zero_()
    assert copy.tolist() == [0, 1, 2]


def test_free_memory_is_that_of_this_host() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory() <= total


def test_a_disk_that_takes_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(NotSaved, match="not written: .*GB are free there, the checkpoints before are whole"):
        save(tmp_path / "checkpoints", 1)


def test_a_rank_that_cannot_write_keeps_all_from_committing(tmp_path: Path) -> None:
    first, second = run_on_ranks(write_on_two, 2, tmp_path / "broken", 1)
    assert first == second
    assert "step-1.tmp: not written: " in first
    assert "GB are free there" in first
    assert not list((tmp_path / "broken").iterdir())
    assert run_on_ranks(write_on_two, 2, tmp_path / "sound", None) == ["", ""]
    found = find_checkpoint(tmp_path / "sound")
    assert found is not None
    assert {name: value.tolist() for name, value in found.model().items()} == {"a": [97.0] * 2, "b": [98.0] * 2}
