"""kill -9 at random moments, each time resumed at another world size: the ledger is that of an uninterrupted run.

The whole data side of a training run, without a model: loaders of all ranks, checkpoints by rename, the ledger.
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaboat.data.prepare import Request, prepare
from megaboat.data.spill import PrepareOptions
from tests.corpus import real_texts, write_jsonl

STEPS = 240
KILLS = 20
AT_ONCE = 11  # steps of one attempt, which then waits to be killed: the run never ends first, however slow the killer

RUN = """
import json, os, sys, time
from pathlib import Path
from megaboat.data.config import DataConfig
from megaboat.data.dataset import open_dataset
from megaboat.data.ledger import Ledger, step_crc
from megaboat.data.loader import Loader

data, run, world, steps, at_once = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
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
for step in range(first, steps + 1):
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
"""


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "lib.jsonl", real_texts(60, 5000))
    prepare(Request({"train": [corpus]}, "bytes", tmp_path / "data", PrepareOptions(val_per_10k=0)))
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()

    def command(name: str, world: int, at_once: int) -> list[str]:
        return [sys.executable, "-c", RUN, *map(str, (tmp_path / "data", tmp_path / name, world, STEPS, at_once))]

    subprocess.run(command("whole", 1, 0), check=True)
    chance = random.Random(0)
    ledger = tmp_path / "killed" / "data_ledger.jsonl"
    worlds, stops = [], []
    for kill in range(KILLS):
        worlds.append(1 + kill % 4)
        process = subprocess.Popen(command("killed", worlds[-1], AT_ONCE))
        size = ledger.stat().st_size if ledger.exists() else 0
        while process.poll() is None and (not ledger.exists() or ledger.stat().st_size == size):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "a run ended, or failed, before it was killed"
        stops.append(ledger.read_bytes().count(b"\n"))
    assert stops == sorted(stops)
    subprocess.run(command("killed", 3, 0), check=True)
    assert ledger.read_bytes() == (tmp_path / "whole" / "data_ledger.jsonl").read_bytes()
    assert len(ledger.read_text().splitlines()) == STEPS
    assert json.loads((tmp_path / "killed" / "state.json").read_text())["step"] == STEPS // 7 * 7
