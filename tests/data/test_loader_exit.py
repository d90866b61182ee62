"""However a process ends, its reading thread must neither abort it nor hold it up."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megaboat.data.prepare import Request, prepare
from megaboat.data.spill import PrepareOptions
from tests.corpus import real_texts, write_jsonl

# Small batches without end, so that the thread is inside numpy and torch whenever the interpreter ends.
START = """
import os, signal, sys, time
from megaboat.data import loader as module
from megaboat.data.config import DataConfig
from megaboat.data.dataset import open_dataset
module.PREFETCH = 1 << 20
loader = module.Loader(DataConfig(seq_len=16), open_dataset(sys.argv[1]), global_batch=4)
"""
BLOCKED = """
class Blocked(module.WindowReader):
    def read(self, *place):
        time.sleep(3600)  # a disk that does not answer
module.WindowReader = Blocked
module.CLOSE_SECONDS = 0.5
"""
ENDINGS = {
    "falls off the end": ("next(loader)", 0),
    "sys.exit before the first batch": ("sys.exit(2)", 2),
    "sys.exit": ("next(loader); sys.exit(3)", 3),
    "refused after the loader was made": ("loader.check_resume({'format': 'another'})", 1),
    "interrupted": ("next(loader); os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", -signal.SIGINT),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exit")
    corpus = write_jsonl(folder / "lib.jsonl", real_texts(40, 5000))
    prepare(Request({"train": [corpus]}, "bytes", folder / "out", PrepareOptions(val_per_10k=0)))
    return folder / "out"


def ending(code: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-X", "faulthandler", "-c", code, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("way", ENDINGS)
def test_the_exit_code_is_the_one_that_was_meant(folder: Path, way: str) -> None:
    last, code = ENDINGS[way]
    done = ending(START + last, folder)
    assert done.returncode == code, done.stderr
    assert "Fatal" not in done.stderr
    assert "terminate" not in done.stderr


def test_a_read_that_never_returns_does_not_keep_the_process(folder: Path) -> None:
    imports, _, made = START.rpartition("loader = ")
    done = ending(imports + BLOCKED + "loader = " + made + "time.sleep(0.3); sys.exit(2)", folder)
    assert done.returncode == 2, done.stderr
