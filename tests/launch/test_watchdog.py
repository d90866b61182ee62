"""A rank that sleeps is named."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from megaboat.engine.watchdog import EXIT_CODE, verdict

SLEEPER = """
import sys, time
from pathlib import Path
import torch
from megaboat.engine.ranks import Ranks
from megaboat.engine.watchdog import Watchdog
from megaboat.log import setup_logging

def sleeps_forever():
    time.sleep(1000)

setup_logging()
with Watchdog(Path(sys.argv[1]), Ranks(0, 1, torch.device("cpu")), 3, report_seconds=0.2) as watchdog:
    for _ in watchdog.over(range(40), "save"):
        time.sleep(0.1)
    watchdog.beat("data")
    sleeps_forever()
"""


def report(rank: int, count: int, line: str = "gather") -> dict[str, Any]:
    return {"rank": rank, "host": f"mb{rank}", "pid": 100 + rank, "count": count, "place": "data", "line": line}


def reports(*items: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {item["rank"]: item for item in items}


def test_the_rank_that_came_least_far() -> None:
    said = verdict(reports(report(0, 8), report(1, 8), report(2, 7, "sleep"), report(3, 8)), 4)
    assert said == "rank 2 (mb2, process 102) held up the run after 'data', at sleep"


def test_the_rank_without_a_word() -> None:
    assert verdict(reports(report(0, 8), report(2, 8)), 3).startswith("rank 1 gave no report")


def test_equal_counts_are_told_apart_by_what_they_do() -> None:
    said = verdict(reports(report(0, 8), report(1, 8, "read"), report(2, 8)), 3)
    assert said.startswith("rank 1 (mb1")
    assert verdict(reports(report(0, 8), report(1, 8)), 2) == "all 2 ranks wait at gather, after 'data'"


def test_a_process_that_hangs_ends_with_its_stacks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SLEEPER, str(tmp_path)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == EXIT_CODE
    assert "no progress for 3 s: rank 0 (" in done.stderr
    assert "in sleeps_forever" in done.stderr
    assert "sleeps_forever" in (tmp_path / "hang" / "rank-00000.stacks").read_text()
    assert json.loads((tmp_path / "hang" / "rank-00000.json").read_text())["place"] == "data"
