"""Out of memory, a full disk, a dead rank: what the run says, and that it goes on."""

import ctypes
import errno
import itertools
import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megaboat.engine.build import open_run
from megaboat.engine.explain import activation_bytes, advice, static_bytes
from megaboat.engine.hooks import Hook, Metrics
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from megaboat.model.seqboat import SeqBoat
from tests.corpus import real_texts, write_jsonl
from tests.distributed import run_on_ranks, start_commands
from tests.engine.conftest import tiny_config, tiny_tree
from tests.engine.runs import ended, losses, train_on_rank, wait_for_step, write_config

M_MMAP_THRESHOLD = -3  # of glibc's mallopt
DEAD_RANK_SECONDS = 120.0  # the rank is named within 15 s; a busy machine may take longer to end


@pytest.fixture(scope="module")
def undisturbed(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run_on_ranks(train_on_rank, 1, tiny_config(dataset_folder, out))
    return out


def at_step(step: int, action: Callable[[], None]) -> None:
    """In this process, do something in the first forward pass of a step of two micro-batches."""
    count = itertools.count(1)

    def hook(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, SeqBoat) and module.training and next(count) == 2 * step - 1:
            action()

    torch.nn.modules.module.register_module_forward_pre_hook(hook)


def no_large_files(size: int) -> None:
    """From step 8 on the system refuses to write past `size` bytes of a file."""
    at_step(8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)))


def no_longer_file(path: Path) -> None:
    """From step 8 on the system refuses to let any file grow much beyond what this one has by then."""
    at_step(8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, resource.RLIM_INFINITY)))


def no_more_memory(spare: int) -> None:
    """From step 2 on this process may not map more than `spare` bytes beyond what it has."""

    def limit() -> None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + spare, resource.RLIM_INFINITY))

    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)  # or freed tensors would stay mapped, for the next step's
    at_step(2, limit)


def test_a_file_that_may_not_grow(undisturbed: Path, dataset_folder: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE refuses the weights from step 8 on: saves fail, training does not, and the last save says so."""
    out = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", tiny_tree(dataset_folder, out))
    (command,) = start_commands(1, tmp_path, "train", str(config), before=(no_large_files, 40_000))
    messages = ended(command, tmp_path, 2)
    assert "step-10 was not written: " in messages, "and the run went on"
    last = messages.strip().splitlines()[-1]
    assert last.startswith("megaboat train: ")
    assert "step-20.tmp: not written: " in last
    assert os.strerror(errno.EFBIG) in last
    assert "GB are free there, the checkpoints before are whole: make room" in last
    assert [path.name for path in (out / "checkpoints").glob("step-*")] == ["step-5"]
    (again,) = start_commands(1, tmp_path, "train", str(config))
    assert "resumed" in ended(again, tmp_path, 0)
    assert losses(out) == losses(undisturbed)


class Ballast(Hook):
    """Fills the disk after step 7, to the last 40 kB, and empties it after step 12."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "ballast"

    def on_step(self, metrics: Metrics) -> None:
        if metrics["step"] == 7:
            space = os.statvfs(self._file.parent)
            self._file.write_bytes(bytes(space.f_bavail * space.f_frsize - 40_000))
        elif metrics["step"] == 12:
            self._file.unlink()


def train_with_ballast(ranks: Ranks, config: RunConfig) -> tuple[str, int]:
    trainer = open_run(config, ranks)
    trainer.hooks = [*trainer.hooks, Ballast(config.train.out.parent)] if ranks.is_first else trainer.hooks
    outcome, _ = trainer.fit()
    return outcome, trainer.step


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_that_is_emptied(small_disk: Path, undisturbed: Path, dataset_folder: Path) -> None:
    """Two ranks: the checkpoint of step 10 finds no room, those of 15 and 20 do."""
    out = small_disk / "run"
    config = tiny_config(dataset_folder, out, train__micro_batch=1)
    assert run_on_ranks(train_with_ballast, 2, config) == [("done", 20)] * 2
    log = (out / "log.txt").read_text()
    assert "step-10 was not written: " in log
    assert os.strerror(errno.ENOSPC) in log
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["latest", "step-15", "step-20"]
    assert losses(out) == pytest.approx(losses(undisturbed), rel=1e-5)


def test_a_full_disk_that_refuses_even_the_metrics(dataset_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", tiny_tree(dataset_folder, out))
    (command,) = start_commands(1, tmp_path, "train", str(config), before=(no_longer_file, out / "metrics.jsonl"))
    messages = ended(command, tmp_path, 2)
    said = [line for line in messages.splitlines() if line.startswith("megaboat train: ")]
    assert len(said) == 1
    assert "make room or mend the disk, and the same command goes on" in said[0]
    (again,) = start_commands(1, tmp_path, "train", str(config))
    ended(again, tmp_path, 0)


def no_file_over(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_is_one_line_of_other_commands_too(tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", real_texts(5, max_chars=6000))
    train = ["tokenizer", "train", "--input", str(texts), "--vocab-size", "400", "--out", str(tmp_path / "t.model")]
    (command,) = start_commands(1, tmp_path, *train, before=(no_file_over, 2000))
    messages = ended(command, tmp_path, 2)
    assert messages.splitlines()[-1] == f"megaboat tokenizer: {os.strerror(errno.EFBIG)}"


def test_out_of_memory_names_three_knobs(dataset_folder: Path, tmp_path: Path) -> None:
    """A real limit on the address space, a little above what the process has when it begins to train."""
    out = tmp_path / "run"
    changes = {"train__micro_batch": 32, "train__global_batch": 64, "data__seq_len": 256, "model__width": 128}
    config = write_config(tmp_path / "run.yaml", tiny_tree(dataset_folder, out, **changes))
    (command,) = start_commands(1, tmp_path, "train", str(config), before=(no_more_memory, 16 << 20))
    messages = ended(command, tmp_path, 2)
    last = messages.strip().splitlines()[-1]
    assert last.startswith("megaboat train: rank 0: out of memory; train.micro_batch=16 saves about ")
    assert re.search(r"train.checkpoint_activations=true saves about [\d.]+ [GM]B", last)
    assert re.search(r"parallel.zero=1 on 2 processes saves [\d.]+ MB of [\d.]+ MB for weights and optimizer", last)


@pytest.mark.parametrize("block", ["paper", "scaled"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_a_forward_pass_keeps(block: str, checkpointed: bool, tmp_path: Path) -> None:
    """Within a factor of two of what autograd really keeps."""
    tree = {"block": block, "layers": 4, "width": 128, "qk_dim": 32, "window": 64, "vocab_size": 256}
    config = RunConfig.model_validate({"model": tree, "train": {"precision": "fp32"}})
    model = build_model(config.model, seed=0)
    model.checkpoint_activations = checkpointed
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tokens = torch.randint(0, 256, (2, 256))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, Documents.whole(2, 256), tokens)
    real = sum(size for size, _ in kept.values())
    if checkpointed:  # and one block in full while it is computed again
        real += activation_bytes(config, tokens.numel()) / 4
    assert 0.5 < activation_bytes(config, tokens.numel(), checkpointed) / real < 2


def test_the_bytes_of_each_stage() -> None:
    """A thousand parameters on four ranks, by hand: weights 4, gradients 4, moments 8, ZeRO's copy of the weights 4."""
    assert [static_bytes(1000, zero, 4) for zero in (0, 1, 2, 3)] == [16_000, 11_000, 8_000, 5_000]
    config = RunConfig.model_validate({"parallel": {"zero": 2}})
    said = advice(config, Ranks(1, 4, torch.device("cpu")), 10**9)
    assert "parallel.zero=3 saves 3 GB of 8 GB" in said
    assert said.count("saves") == 3
    small = RunConfig.model_validate({"train": {"micro_batch": 1, "checkpoint_activations": True}})
    assert "data.seq_len=1024 with a new train.out" in advice(small, Ranks(0, 1, torch.device("cpu")), 10)


@pytest.mark.slow
def test_kill_9_of_one_of_four_ranks(undisturbed: Path, dataset_folder: Path, tmp_path: Path) -> None:
    """No launcher that ends the others: they notice, name the dead one and end; started again, the run goes on."""
    out = tmp_path / "run"
    tree = tiny_tree(dataset_folder, out, train__micro_batch=1)
    config = write_config(tmp_path / "run.yaml", tree)
    ranks = start_commands(4, tmp_path, "train", str(config))
    wait_for_step(out, 7, ranks[0])
    ranks[2].kill()
    for rank in (0, 1, 3):
        ended(ranks[rank], tmp_path, 5, rank, DEAD_RANK_SECONDS)
    assert "rank 2 gave no report: its node or process is gone or stopped" in (out / "log.txt").read_text()
    for rank, process in enumerate(start_commands(4, tmp_path, "train", str(config))):
        ended(process, tmp_path, 0, rank)
    assert losses(out) == pytest.approx(losses(undisturbed), rel=1e-5)
