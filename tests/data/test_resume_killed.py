"""kill -9 at random moments, each time resumed at another world size: the ledger is that of an uninterrupted run.

The whole data side of a training run, without a model: loaders of all ranks, checkpoints by rename, the ledger.
"""

import json
import random
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from megaboat.data.config import DataConfig
from megaboat.data.dataset import open_dataset
from megaboat.data.ledger import Ledger, step_crc
from megaboat.data.loader import Loader
from megaboat.data.prepare import Request, prepare
from megaboat.data.spill import PrepareOptions
from tests.corpus import real_texts, write_jsonl
from tests.distributed import start_process

STEPS = 240
KILLS = 20
AT_ONCE = 11  # steps of one attempt, which then waits to be killed: the run never ends first, however slow the killer


def train(data: Path, run: Path, world: int, at_once: int) -> None:
    """The data side of training, from the last checkpoint to step STEPS; or `at_once` steps, and then nothing more."""
    checkpoint = run / "state.json"
    state = json.loads(checkpoint.read_text()) if checkpoint.exists() else None
    config = DataConfig(seq_len=64, mask_first_target=True)
    start = state["consumed_windows"] if state else 0
    ranks = [Loader(config, open_dataset(data), 12, rank, world, start) for rank in range(world)]
    if state:
        for loader in ranks:
            loader.check_resume(state)
    ledger = Ledger(run / "data_ledger.jsonl")
    first = state["step"] + 1 if state else 1
    for step in range(first, STEPS + 1):
        parts = [next(loader) for loader in ranks]
        crc = step_crc([c for part in parts for c in part.crcs])
        ledger.append(step, parts[0].first_window, crc)
        if step % 7 == 0:
            temporary = run / "state.tmp"
            temporary.write_text(json.dumps(ranks[0].state(step, crc)))
            temporary.rename(checkpoint)
        time.sleep(0.01 if at_once else 0)
        if at_once and step + 1 == first + at_once:
            time.sleep(1000)


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "lib.jsonl", real_texts(60, 5000))
    prepare(Request({"train": [corpus]}, "bytes", tmp_path / "data", PrepareOptions(val_per_10k=0)))
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()

    def start(name: str, world: int, at_once: int = 0) -> ForkServerProcess:
        return start_process(train, tmp_path / "data", tmp_path / name, world, at_once)

    whole = start("whole", 1)
    whole.join()
    assert whole.exitcode == 0
    chance = random.Random(0)
    ledger = tmp_path / "killed" / "data_ledger.jsonl"
    worlds, stops = [], []
    for kill in range(KILLS):
        worlds.append(1 + kill % 4)
        process = start("killed", worlds[-1], AT_ONCE)
        size = ledger.stat().st_size if ledger.exists() else 0
        while process.is_alive() and (not ledger.exists() or ledger.stat().st_size == size):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "a run ended, or failed, before it was killed"
        stops.append(ledger.read_bytes().count(b"\n"))
    assert stops == sorted(stops)
    last = start("killed", 3)
    last.join()
    assert last.exitcode == 0
    assert ledger.read_bytes() == (tmp_path / "whole" / "data_ledger.jsonl").read_bytes()
    assert len(ledger.read_text().splitlines()) == STEPS
    assert json.loads((tmp_path / "killed" / "state.json").read_text())["step"] == STEPS // 7 * 7
