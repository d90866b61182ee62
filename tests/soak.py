"""A long run that is disturbed all the time, compared with one that is not.

    python -m tests.soak                                  2,000 steps, 40 disturbances, some minutes
    python -m tests.soak --steps 300 --faults 8 --seed 1

Ranks of `megaboat train` are killed (all, or one), asked to stop, find the disk full; the newest checkpoint is damaged;
each attempt has another number of ranks. Some rows of the corpus, when they are trained on, give a loss that is not a
number: a hook on the model, which this script registers before it calls the command, sees to that.

At the end the ledger must be that of an undisturbed run, but for the steps with such rows, which it must name; and the
held-out loss must be the same within noise.
"""

import argparse
import collections
import json
import os
import random
import resource
import signal
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megaboat.config import build_config
from megaboat.data.dataset import open_dataset
from megaboat.data.loader import Loader
from megaboat.data.prepare import Request, prepare
from megaboat.data.spill import PrepareOptions
from megaboat.engine.run_config import RunConfig
from megaboat.model.seqboat import ModelOutput, SeqBoat
from tests.corpus import real_texts, write_jsonl
from tests.distributed import start_commands
from tests.engine.conftest import tiny_tree
from tests.engine.runs import write_config

GLOBAL_BATCH, WORLDS = 4, (1, 2, 4)
SAVE_EVERY = 20
KINDS = ("kill all", "kill one", "ask to stop", "fill the disk", "damage the newest checkpoint")
PATIENCE = 300.0
NOISE = 0.03  # of the held-out loss: some updates fewer, and sums in another order on other numbers of ranks


class Soak:
    """The disturbed run in `folder`, on a disk of its own where this process may mount one."""

    def __init__(self, folder: Path, steps: int, faults: int, seed: int) -> None:
        self.folder, self.steps, self.faults, self.chance = folder, steps, faults, random.Random(seed)
        self.done: collections.Counter[str] = collections.Counter()
        self.disk = folder / "disk"
        self.disk.mkdir()
        self.out = self.disk / "run"
        self.data = make_data(folder)
        self.spoilt = self._choose_spoilt()
        self.started = time.monotonic()

    def config(self, out: Path) -> Path:
        model = {"layers": 1, "width": 16, "qk_dim": 8, "window": 8, "heads": 1}
        changes = {"global_batch": GLOBAL_BATCH, "micro_batch": 1, "save_every": SAVE_EVERY, "steps": self.steps}
        tree = tiny_tree(self.data, out, data__seq_len=16, **{f"train__{key}": value for key, value in changes.items()})
        return write_config(self.folder / f"{out.name}.yaml", tree | {"model": model, "optim": {"lr": 3e-3}})

    def run(self) -> None:
        """Disturb attempt after attempt, then let the last one come to its end."""
        rows = self._rows_of(self.spoilt)
        attempts = self.faults - len(self.spoilt)
        for attempt in range(attempts):
            world, kind = self.chance.choice(WORLDS), KINDS[attempt % len(KINDS)]
            due = self.steps_done() + self.chance.randint(
                3, max(4, 2 * (self.steps - self.steps_done()) // (attempts + 1 - attempt))
            )
            processes = self.start(world, rows)
            self.wait(lambda due=due: self.steps_done() >= due, processes)
            if any(process.is_alive() for process in processes):
                self.disturb(kind, processes)
                self.done[kind] += 1
            self.end(processes)
            self.say(f"{world} ranks, {kind} at step {self.steps_done()}")
        processes = self.start(2, rows)
        self.end(processes)
        assert [process.exitcode for process in processes] == [0, 0], self.said()
        self.done["loss that is not a number"] = len(self.spoilt)

    def start(self, world: int, rows: set[int]) -> list[ForkServerProcess]:
        prepare_rank = (spoil_rows, rows)
        return start_commands(world, self.folder, "train", str(self.config(self.out)), before=prepare_rank)

    def disturb(self, kind: str, processes: list[ForkServerProcess]) -> None:
        if kind == "kill one":
            self.chance.choice(processes).kill()
        elif kind == "ask to stop":
            os.kill(self.chance.choice(processes).pid or 0, self.chance.choice([signal.SIGTERM, signal.SIGUSR1]))
        elif kind == "fill the disk":
            self.fill_disk(processes)
        else:
            for process in self.chance.sample(processes, len(processes)):
                process.kill()
        if kind == "damage the newest checkpoint":
            self.end(processes)
            self.damage()

    def fill_disk(self, processes: list[ForkServerProcess]) -> None:
        """To the last 30 kB, until a save was refused; without a disk of our own, no file may grow any more."""
        if not os.path.ismount(self.disk):
            for process in processes:
                resource.prlimit(process.pid or 0, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            return
        refused = self.said().count("was not written")
        space = os.statvfs(self.disk)
        (self.disk / "ballast").write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - 30_000)))
        self.wait(lambda: self.said().count("was not written") > refused, processes)
        (self.disk / "ballast").unlink()
        for process in processes:
            process.kill()

    def damage(self) -> None:
        folders = sorted((self.out / "checkpoints").glob("step-*[0-9]"), key=lambda path: int(path.name[5:]))
        if len(folders) < 2:
            return
        path = self.chance.choice(sorted(folders[-1].glob("*.safetensors")))
        content = bytearray(path.read_bytes())
        content[self.chance.randrange(len(content))] ^= 1
        path.write_bytes(content)

    def steps_done(self) -> int:
        ledger = self.out / "data_ledger.jsonl"
        return ledger.read_bytes().count(b"\n") if ledger.exists() else 0

    def wait(self, until: Callable[[], object], processes: list[ForkServerProcess]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not until() and any(process.is_alive() for process in processes):
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def end(self, processes: list[ForkServerProcess]) -> None:
        """Wait until all ranks have ended: asked to, killed, or for want of the one that was."""
        for process in processes:
            process.join(PATIENCE + self.steps)
            assert process.exitcode is not None, self.said()

    def said(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-20_000:] for path in self.folder.glob("rank-*.log"))

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.0f} s  {text}", flush=True)

    def compare(self) -> str:
        """What was done and seen; AssertionError where the run is not the undisturbed one."""
        whole = self.folder / "whole"
        processes = start_commands(1, self.folder, "train", str(self.config(whole)))
        self.end(processes)
        ours, theirs = (ledger(out) for out in (self.out, whole))
        named = {line["step"] for line in ours if line.pop("skipped", None)}
        assert ours == theirs, "other tokens than in the undisturbed run"
        assert named == self.spoilt, f"named {sorted(named)}, spoilt {sorted(self.spoilt)}"
        ours_nll, theirs_nll = (last_nll(out) for out in (self.out, whole))
        assert abs(ours_nll / theirs_nll - 1) < NOISE, f"held-out nll {ours_nll} against {theirs_nll}"
        count = sum(self.done.values())
        faults = ", ".join(f"{number} x {kind}" for kind, number in sorted(self.done.items()))
        return (
            f"{self.steps} steps, {count} disturbances ({faults}): the ledger is the undisturbed run's; the "
            f"{len(named)} steps left out are named; held-out nll {ours_nll:.4f}, undisturbed {theirs_nll:.4f}"
        )

    def _choose_spoilt(self) -> set[int]:
        """Single steps all over the run, and three in a row, after which the run goes back to its checkpoint."""
        singles = max(1, self.faults // 5)
        row = self.chance.randint(self.steps // 3, self.steps // 2)
        others = [step for step in range(5, self.steps - 5) if abs(step - row) > 10]
        return {row, row + 1, row + 2} | set(self.chance.sample(others, singles))

    def _rows_of(self, steps: set[int]) -> set[int]:
        """The crc of the first row of tokens in each of the steps."""
        config = build_config(RunConfig, tiny_tree(self.data, self.out, data__seq_len=16), "the soak")
        loader = Loader(config.data, open_dataset(self.data), GLOBAL_BATCH)
        rows = {step: crc_of(next(loader).tokens_BT[0]) for step in range(1, max(steps) + 1)}
        loader.close()
        wanted = {rows[step] for step in steps}
        again = [step for step, crc in rows.items() if crc in wanted and step not in steps]
        assert not again, f"the corpus holds the same row twice: {again}"
        return wanted


def make_data(folder: Path) -> Path:
    """Real text as bytes, a little of it held out."""
    texts = write_jsonl(folder / "texts.jsonl", real_texts(60))
    prepare(Request({"train": [texts]}, "bytes+eos", folder / "tokens", PrepareOptions(val_per_10k=300)))
    return folder / "tokens"


def spoil_rows(rows: set[int]) -> None:
    """In this process, make the loss of every training batch that holds one of `rows` not a number."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> ModelOutput | None:
        if not isinstance(module, SeqBoat) or not module.training or output.nll is None:
            return None
        spoilt = any(crc_of(row) in rows for row in inputs[0])
        return output._replace(nll=output.nll * torch.nan) if spoilt else None

    torch.nn.modules.module.register_module_forward_hook(hook)


def crc_of(row: torch.Tensor) -> int:
    return zlib.crc32(row.to(torch.int64).numpy().tobytes())


def ledger(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "data_ledger.jsonl").read_text().splitlines()]


def last_nll(out: Path) -> float:
    return json.loads((out / "evaluation.jsonl").read_text().splitlines()[-1])["overall"]["nll"]


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A small disk at `folder`, where that is allowed."""
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False)
    try:
        yield
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def soak(folder: Path, steps: int, faults: int, seed: int = 0) -> str:
    """Disturb and compare; returns what was seen, raises AssertionError where it is not as it should be."""
    run = Soak(folder, steps, faults, seed)
    with mounted(run.disk):
        run.run()
        return run.compare()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(soak(Path(scratch), chosen.steps, chosen.faults, chosen.seed))
