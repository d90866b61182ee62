"""The README's two set-up commands, run as printed on a clean clone; and the commands that it names exist."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megaboat.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SET_UP = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)


def test_there_are_two_set_up_commands() -> None:
    assert len(SET_UP) == 2
    assert "configs/quickstart.yaml" in SET_UP[0]
    assert "pytest" in SET_UP[1]
    assert "bits/byte" in README, "the first command's output is shown"


def test_every_command_that_it_names_exists() -> None:
    blocks = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    named = set(re.findall(r"^(?:\S*/)?megaboat (\w+)", blocks, re.MULTILINE))
    assert named
    assert named <= set(COMMANDS)


def test_every_file_that_it_names_exists() -> None:
    named = re.findall(r"(?:configs|launch|data|tests|megaboat)/[\w./]+\.(?:yaml|sh|md|py)", README)
    assert named
    missing = [name for name in named if not (ROOT / name).is_file()]
    assert not missing


def test_every_key_of_metrics_is_explained(tmp_path: Path) -> None:
    """The table of metrics.jsonl names what `engine.metrics.step_metrics` writes, no more and no less."""
    source = (ROOT / "megaboat/engine/metrics.py").read_text()
    written = set(re.findall(r'^        "(\w+)":', source, re.MULTILINE))
    table = README[README.index("| `metrics.jsonl` |") : README.index("## What is proved")]
    explained = {
        name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert explained - {"jsonl"} == written


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean clone of what is committed, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("a clone") / "megaboat"
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("a clean clone needs git and a checkout")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    return folder


NOT_A_READER_S = ("VIRTUAL_ENV", "PYTHONPATH", "OMP_NUM_THREADS")


def start_in_clone(clone: Path, command: str) -> "subprocess.Popen[str]":
    """A command line as a terminal starts it: in a session of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in NOT_A_READER_S}
    # Its threads, one for each processor, share these with other tests: waiting busily, a step took ten times as long.
    environment["OMP_WAIT_POLICY"] = "passive"
    environment["PATH"] = f"{Path(sys.base_prefix) / 'bin'}{os.pathsep}{environment['PATH']}"
    return subprocess.Popen(
        ["bash", "-c", command], cwd=clone, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


def in_clone(clone: Path, command: str) -> str:
    """What a command that ends well prints."""
    started = start_in_clone(clone, command)
    printed, _ = started.communicate(timeout=1800)
    assert started.returncode == 0, printed[-5000:]
    return printed


def interrupt(clone: Path, command: str, stage: str, once: Callable[[], bool] = lambda: True) -> None:
    """Ctrl-C, to the command and all that it started, a moment after the stage has begun and `once` holds."""
    started = start_in_clone(clone, command)
    assert started.stdout is not None
    printed = ""
    while f"==> {stage}" not in printed:
        line = started.stdout.readline()
        assert line, f"it ended before {stage!r}:\n{printed[-5000:]}"
        printed += line
    while not once():
        assert started.poll() is None, printed[-2000:] + started.stdout.read()
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(started.pid, signal.SIGINT)
    rest, _ = started.communicate(timeout=600)
    assert started.returncode == 130, printed[-2000:] + rest[-3000:]
    assert rest.endswith("megaboat quickstart: interrupted; run the same command again to go on\n"), rest[-3000:]


STAGES = (
    "text that this Python installation carries",
    "a tokenizer",
    "tokens in shards",
    "training",
    "held-out text",
    "pictures",
    "an export",
    "a sample",
)


def steps_of(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.slow
def test_the_first_command_ends_with_a_sample_however_often_it_is_interrupted(clone: Path) -> None:
    """Shortened by one override: the steps of training. Everything else is as printed, run again after each Ctrl-C."""
    short = " train.steps=12 train.save_every=6"
    again = SET_UP[0][SET_UP[0].index(".venv/bin/megaboat") :] + short
    run = clone / "runs" / "quickstart"
    interrupt(clone, SET_UP[0] + short, STAGES[0])
    for stage in STAGES[1:]:
        interrupt(clone, again, stage)
        if stage == "training":
            interrupt(clone, again, stage, once=lambda: len(steps_of(run)) >= 2)
    printed = in_clone(clone, SET_UP[0] + short)
    for stage in ("==> a tokenizer", "==> training"):
        assert stage not in printed, "a finished stage was done again"
    for sign in ("==> tokens in shards", "unigram", "==> pictures", "proved in a process without megaboat", "Done in"):
        assert sign in printed
    assert steps_of(run) == list(range(1, 13))
    assert "resumed" in (run / "log.txt").read_text()
    assert (run / "report" / "index.html").is_file()
    assert (run / "export" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_second_command_passes(clone: Path) -> None:
    """On a few files, so that the whole suite does not run inside itself, and one test that compares processes."""
    few = "tests/test_configs.py tests/test_floors.py tests/kernels/test_ema.py"
    printed = in_clone(clone, f"{SET_UP[1]} {few} tests/engine/test_explain.py::test_a_file_that_may_not_grow")
    assert re.search(r"\d+ passed", printed) or "100%" in printed
