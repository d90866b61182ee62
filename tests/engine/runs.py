"""Runs as tests start them and look at them."""

import json
import subprocess
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from megaboat.engine.build import open_run
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig


def train_on_rank(ranks: Ranks, config: RunConfig) -> tuple[str, int]:
    """For `run_on_ranks`: a whole run. Returns its outcome and last step."""
    trainer = open_run(config, ranks)
    outcome, _ = trainer.fit()
    return outcome, trainer.step


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    """The loss of each step, in order, after checking that no step is missing or doubled."""
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def ended(process: BaseProcess, folder: Path, code: int = 0, rank: int = 0, seconds: float = 600.0) -> str:
    """Wait for a rank of `start_commands` to end with `code`; what it has printed. The limit is for a hang alone."""
    process.join(seconds)
    messages = (folder / f"rank-{rank}.log").read_text()
    assert process.exitcode == code, messages
    return messages


def wait_for_step(out: Path, step: int, command: "subprocess.Popen[str] | BaseProcess") -> None:
    """Until the run in `out` has written so many steps."""
    path = out / "metrics.jsonl"
    wait_until(lambda: path.is_file() and path.read_text().count("\n") >= step, command)


def wait_until(happened: Callable[[], bool], command: "subprocess.Popen[str] | BaseProcess") -> None:
    """While the command runs."""
    deadline = time.monotonic() + 600
    while not happened():
        code = command.exitcode if isinstance(command, BaseProcess) else command.poll()
        assert code is None, "the run ended before"
        assert time.monotonic() < deadline, "not in ten minutes"
        time.sleep(0.01)


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path
