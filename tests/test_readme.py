"""The README's two set-up commands, run as printed on a clean clone; and the commands that it names exist."""

import os
import re
import shutil
import subprocess
import sys
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


def in_clone(clone: Path, command: str, seconds: float) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    environment["PATH"] = f"{Path(sys.base_prefix) / 'bin'}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_first_command_ends_with_a_sample(clone: Path) -> None:
    """Shortened by one override: the steps of training. Everything else is as printed."""
    printed = in_clone(clone, SET_UP[0] + " train.steps=12 train.save_every=6", seconds=1200)
    for stage in ("a tokenizer", "tokens in shards", "training", "beside simpler models", "an export", "a sample"):
        assert stage in printed
    assert "proved in a process without megaboat" in printed
    assert (clone / "runs/quickstart/report/index.html").is_file()
    assert (clone / "runs/quickstart/export/model.safetensors").is_file()
    again = in_clone(clone, ".venv/bin/megaboat quickstart configs/quickstart.yaml train.steps=12", seconds=300)
    assert "==> training" not in again, "a finished stage was done again"


@pytest.mark.slow
def test_the_second_command_passes(clone: Path) -> None:
    """On the fast half of the tests, so that the whole suite does not run inside itself."""
    printed = in_clone(clone, SET_UP[1] + " tests/test_configs.py tests/layers tests/kernels", seconds=1200)
    assert re.search(r"\d+ passed", printed) or "100%" in printed
