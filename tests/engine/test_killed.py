"""kill -9 to all ranks of a training run, again and again, each time resumed on another number of ranks.

Killed while it starts, between any two steps and inside the commit of a checkpoint; the ledger must be that of a run
that nobody disturbed, byte for byte. `--kills 20` kills more often.
"""

import contextlib
import random
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests.distributed import start_commands
from tests.engine.conftest import tiny_tree
from tests.engine.runs import write_config

GLOBAL_BATCH = 12
WORLDS = (1, 2, 3, 4)


class Run:
    """A run folder, and the command that starts or resumes training in it on some ranks."""

    def __init__(self, data: Path, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.out = folder, folder / "run"
        model = {"layers": 1, "width": 16, "qk_dim": 8, "window": 8, "heads": 1}
        changes = {"global_batch": GLOBAL_BATCH, "save_every": 3, "steps": 1_000_000}
        tree = tiny_tree(data, self.out, **{f"train__{key}": value for key, value in changes.items()})
        self.config = write_config(folder / "run.yaml", tree | {"model": model, "optim": {"lr": 1e-3}})
        self.ledger = self.out / "data_ledger.jsonl"

    def start(self, world: int, *overrides: str) -> list[ForkServerProcess]:
        micro_batch = f"train.micro_batch={GLOBAL_BATCH // world}"
        return start_commands(world, self.folder, "train", str(self.config), micro_batch, *overrides)

    def finish(self, world: int, steps: int) -> None:
        processes = self.start(world, f"train.steps={steps}")
        for process in processes:
            process.join(180)
        assert [process.exitcode for process in processes] == [0] * world, self.said()

    def steps(self) -> int:
        return self.ledger.read_bytes().count(b"\n") if self.ledger.exists() else 0

    def commits_under_way(self) -> set[tuple[str, int]]:
        """Name and time of every folder that was not committed: of this attempt or left by one that was killed."""
        found = set()
        for path in (self.out / "checkpoints").glob("step-*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_ctime_ns))
        return found

    def said(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in self.folder.glob("rank-*.log"))

    def wait(self, until: Callable[[], object], processes: list[ForkServerProcess]) -> None:
        deadline = time.monotonic() + 180
        while not until():
            assert all(process.is_alive() for process in processes), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.001)


def kill(processes: list[ForkServerProcess], chance: random.Random) -> None:
    for process in chance.sample(processes, len(processes)):
        process.kill()
    for process in processes:
        process.join()


@pytest.mark.slow
def test_kills_leave_no_trace_in_the_ledger(dataset_folder: Path, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    kills = pytestconfig.getoption("kills")
    run, chance = Run(dataset_folder, tmp_path / "killed"), random.Random(0)
    torn, attempt = 0, 0
    while attempt < kills or torn < kills // 3:
        assert attempt < 5 * kills, "no kill meets a commit"
        moment = ("commit", "step", "commit", "start")[attempt % 4]
        before, stale = run.steps(), run.commits_under_way()
        processes = run.start(world := WORLDS[attempt % 4])
        if moment != "start":
            run.wait(lambda before=before: run.steps() > before, processes)
        if moment == "commit":
            run.wait(lambda stale=stale: run.commits_under_way() - stale, processes)
            time.sleep(chance.uniform(0, 0.003))
        else:
            time.sleep(chance.uniform(0, 1.0))
        kill(processes, chance)
        attempt += 1
        left = sorted(name for name, _ in run.commits_under_way() - stale)
        torn += bool(left)
        print(f"kill {attempt}: {world} ranks, {moment}, ledger at step {run.steps()}, left {left}")
    steps = run.steps() + 5
    run.finish(3, steps)
    whole = Run(dataset_folder, tmp_path / "whole")
    whole.finish(1, steps)
    assert run.steps() == steps
    assert run.ledger.read_bytes() == whole.ledger.read_bytes()
