"""A signal to one rank, at any moment: all ranks stop at the same step, and the run that goes on is the same run."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megaboat.config import build_config
from megaboat.engine.build import open_run
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from tests.distributed import run_on_ranks
from tests.engine.conftest import tiny_config, tiny_tree
from tests.engine.runs import losses, train_on_rank

ROOT = Path(__file__).parents[2]
TIMES = {"train__steps": 6, "train__eval_every": 2, "train__save_every": 4, "train__global_batch": 8}
TIMES |= {"data__seq_len": 128, "train__eval_tokens": 4096}

# Announces itself after the imports, as training does.
PATIENT = """
import sys, time
print("imports", flush=True)
time.sleep(1)
from megaboat.engine.stop import StopRequest
with StopRequest() as stop:
    print(stop.received, flush=True)
"""


def evaluations(out: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (out / "evaluation.jsonl").read_text().splitlines())
    return [(line["step"], line["overall"]["nll"]) for line in lines]


def train_and_signal(ranks: Ranks, config: RunConfig, place: str, after: int) -> tuple[str, str, int]:
    """A run whose rank 1 receives USR1 when it first comes to `place` after `after` steps."""
    trainer = open_run(config, ranks)
    beat, sent = trainer.watchdog.beat, []

    def beat_and_signal(here: str) -> None:
        beat(here)
        if ranks.rank == 1 and here == place and trainer.step == after and not sent:
            sent.append(here)
            os.kill(os.getpid(), signal.SIGUSR1)

    trainer.watchdog.beat = beat_and_signal  # type: ignore[method-assign]
    return *trainer.fit(), trainer.step


@pytest.fixture(scope="module")
def undisturbed(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run_on_ranks(train_on_rank, 1, tiny_config(dataset_folder, out, **TIMES))
    return out


@pytest.mark.parametrize(
    ("place", "after", "step"),
    [
        ("data", 2, 3),
        ("backward", 2, 3),  # of the first of two micro-batches
        ("save", 4, 4),
        ("evaluate", 2, 2),
        ("evaluate", 6, 6),  # the last one, of everything
    ],
)
def test_a_signal_at_any_moment(
    undisturbed: Path, dataset_folder: Path, tmp_path: Path, place: str, after: int, step: int
) -> None:
    config = tiny_config(dataset_folder, tmp_path / "run", **TIMES)
    ends = run_on_ranks(train_and_signal, 2, config, place, after)
    assert ends == [("requeue", "stopped by SIGUSR1", step)] * 2
    assert run_on_ranks(train_on_rank, 2, config) == [("done", 6)] * 2
    assert losses(tmp_path / "run") == pytest.approx(losses(undisturbed), rel=1e-5)
    assert evaluations(tmp_path / "run") == [(s, pytest.approx(nll, rel=1e-5)) for s, nll in evaluations(undisturbed)]


def compiler_of(parent: int) -> int | None:
    """The C++ compiler that a process waits for, directly or through others."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, fields = stat.read_text().split("(", 1)[1].rsplit(")", 1)
            child = int(stat.parent.name)
            if int(fields.split()[1]) == parent and (name == "cc1plus" or compiler_of(child)):
                return child
    return None


def train_compiled(ranks: Ranks, config: RunConfig, cache: Path) -> tuple[str, str, int]:
    """The dense baseline compiled for the CPU, for whose compiler nothing is ready; USR1 comes while that works."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    trainer = open_run(config, ranks)
    trainer.engine.module.compile_layers()

    def signal_when_it_compiles() -> None:
        while not compiler_of(os.getpid()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=signal_when_it_compiles, daemon=True).start()
    return *trainer.fit(), trainer.step


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_a_signal_while_the_model_is_compiled(dataset_folder: Path, tmp_path: Path) -> None:
    tree = tiny_tree(dataset_folder, tmp_path / "run", **TIMES)
    tree["model"] = {"family": "llama", "layers": 1, "width": 32, "heads": 2}
    config = build_config(RunConfig, tree, "the test")
    assert run_on_ranks(train_compiled, 1, config, tmp_path / "cache") == [("requeue", "stopped by SIGUSR1", 1)]


def test_a_signal_during_the_imports_is_kept() -> None:
    """launch/rank.sh holds signals back, from before Python's first line, until someone can answer them."""
    command = ["bash", "launch/rank.sh", sys.executable, "-c", PATIENT]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "imports\n"
        rank.send_signal(signal.SIGUSR1)
        assert rank.stdout.read() == "SIGUSR1\n"
    assert rank.returncode == 0
