"""The batch scripts and the configs that they train: readable by bash, sizes as their first lines say."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megaboat.config import load_config
from megaboat.engine.run_config import RunConfig
from megaboat.model.config import SeqBoatConfig
from megaboat.model.seqboat import SeqBoat

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
UNITS = {"M": 1e6, "B": 1e9}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == ""


@pytest.mark.parametrize("size", ["125m", "1b", "7b"])
def test_a_config_says_its_size_and_fits_its_script(size: str) -> None:
    path = ROOT / "configs" / f"{size}.yaml"
    config = load_config(RunConfig, path)
    assert isinstance(config.model, SeqBoatConfig)
    with torch.device("meta"):
        model = SeqBoat(config.model)
    count = sum(parameter.numel() for parameter in model.parameters())
    said = re.search(r"of ([\d.]+) ([MB]) parameters", path.read_text())
    assert said is not None
    assert float(said[1]) * UNITS[said[2]] == pytest.approx(count, rel=1e-3)
    script = (ROOT / "launch" / f"train_{size}.sh").read_text()
    nodes, tasks = (int(re.findall(rf"--{name}=(\d+)", script)[-1]) for name in ("nodes", "ntasks-per-node"))
    config.check_world(nodes * tasks)
    tokens = config.train.steps * config.train.global_batch * config.data.seq_len
    assert tokens / count == pytest.approx(20, rel=0.05)
