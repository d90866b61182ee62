"""Jobs as users submit them, on the test cluster: launch/train_1b.sh unedited, with a tiny config and few CPUs."""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from megaboat.data.ledger import Entry
from tests.engine.conftest import tiny_tree
from tests.engine.runs import losses, metrics
from tests.launch.cluster import PATIENCE, Cluster, until

ROOT = Path(__file__).parents[2]
SMALL = ("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=10")


class Job:
    """A submitted run: its number, its folder and its batch log."""

    def __init__(self, cluster: Cluster, number: str, out: Path, log: Path) -> None:
        self.cluster, self.number, self.out, self.log = cluster, number, out, log

    def wait(self, *states: str, seconds: float = PATIENCE) -> str:
        try:
            return self.cluster.wait(self.number, states, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None

    def wait_for_step(self, step: int, seconds: float = PATIENCE) -> None:
        def reached() -> bool:
            path = self.out / "metrics.jsonl"
            return path.is_file() and path.read_text().count("\n") >= step

        try:
            until(reached, seconds, f"step {step}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None

    def wait_for_news(self) -> None:
        """Until the run is past all steps noted so far, by lost ranks too: these it must repeat to the letter."""
        self.wait_for_step((self.out / "data_ledger.jsonl").read_text().count("\n") + 20)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def outcome(self) -> dict[str, Any]:
        return json.loads((self.out / "outcome.json").read_text())


def submit(
    cluster: Cluster, folder: Path, data: Path, *options: str, overrides: tuple[str, ...] = (), **changes: Any
) -> Job:
    """sbatch launch/train_1b.sh with a run in `folder`; `changes` as for `tiny_tree`."""
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_tree(data, folder / "run", **{"train__micro_batch": 1} | changes)))
    log = folder / "job-%j.out"
    arguments = ("--nodes=2", *SMALL, f"--output={log}", *options, "launch/train_1b.sh", config, *overrides)
    number = cluster.sbatch(*arguments, cwd=ROOT, PYTHON=sys.executable, OMP_NUM_THREADS="1")
    return Job(cluster, number, folder / "run", Path(str(log).replace("%j", number)))


def check_whole(out: Path, steps: int) -> list[float]:
    """No step lost or doubled in metrics and ledger, no window lost or repeated. Returns the losses."""
    curve = losses(out)
    assert len(curve) == steps
    entries = [Entry(**json.loads(line)) for line in (out / "data_ledger.jsonl").read_text().splitlines()]
    assert [entry.step for entry in entries] == list(range(1, steps + 1))
    assert [entry.first_window for entry in entries] == [4 * step for step in range(steps)]
    assert metrics(out)[-1]["tokens"] == steps * 4 * 32
    return curve
