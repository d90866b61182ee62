"""A run that makes no progress ends and says which rank held it up, with the stacks of all ranks.

Every rank counts the same moments of its loop (`beat`). When one sleeps, the others soon wait for it in a collective,
some moments further on: the rank with the lowest count is the one. Each rank writes its count and stacks to a file of
its own, since a stuck job cannot communicate.
"""

import collections
import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from megaboat.engine.ranks import Ranks
from megaboat.log import get_logger

EXIT_CODE = 5
REPORT_SECONDS = 10.0  # ranks beat at slightly different times: until all have written their file

T = TypeVar("T")


class Watchdog:
    """Watches this rank from a thread while the context is open; `seconds` 0 watches nothing."""

    def __init__(self, folder: Path, ranks: Ranks, seconds: float, report_seconds: float = REPORT_SECONDS) -> None:
        self._folder, self._ranks, self._seconds = folder / "hang", ranks, seconds
        self._report_seconds = report_seconds
        self._count, self._place, self._time = 0, "start", time.monotonic()
        self._main = threading.get_ident()

    def __enter__(self) -> "Watchdog":
        self._over = threading.Event()
        self.beat("start")
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def beat(self, place: str) -> None:
        """Progress: this rank comes to `place`. All ranks pass the same places in the same order."""
        self._count, self._place, self._time = self._count + 1, place, time.monotonic()

    def over(self, items: Iterable[T], place: str) -> Iterator[T]:
        """`items`, with a beat at each."""
        for item in items:
            self.beat(place)
            yield item

    def _watch(self) -> None:
        over = self._over  # of this context; the next one has its own
        while not over.wait(min(1.0, self._seconds / 10)):
            if time.monotonic() - self._time > self._seconds:
                self._end()

    def _end(self) -> None:
        """Write what this rank does, wait for the others' files, name the rank, end the process."""
        self._folder.mkdir(parents=True, exist_ok=True)
        since = time.time()
        report = {
            "rank": self._ranks.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "count": self._count,
            "place": self._place,
            "line": self._innermost(),
        }
        with (self._folder / f"rank-{self._ranks.rank:05d}.stacks").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        _report_path(self._folder, self._ranks.rank).write_text(json.dumps(report))
        time.sleep(self._report_seconds)
        reports = read_reports(self._folder, since - self._report_seconds - 5)
        if reports and min(reports) == self._ranks.rank:
            message = f"no progress for {self._seconds:g} s: {verdict(reports, self._ranks.size)}"
            get_logger().error("%s; stacks of all ranks are in %s", message, self._folder)
            for handler in get_logger().handlers:
                handler.flush()
        os._exit(EXIT_CODE)  # the main thread hangs: nothing gentler ends it

    def _innermost(self) -> str:
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return "unknown"
        last = traceback.extract_stack(frame)[-1]
        return f"{last.filename}:{last.lineno} in {last.name}"


def read_reports(folder: Path, since: float) -> dict[int, dict[str, Any]]:
    """The reports by rank that were written after `since`; a rank that cannot run Python has none."""
    reports = {}
    for path in folder.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            if path.stat().st_mtime >= since:
                report = json.loads(path.read_text())
                reports[report["rank"]] = report
    return reports


def verdict(reports: dict[int, dict[str, Any]], size: int) -> str:
    """Which ranks are behind: those without a report, else those that came least far, else those that do what the
    fewest others do."""
    silent = sorted(set(range(size)) - set(reports))
    if silent:
        return f"{_ranks(silent)} gave no report: its node or process is gone or stopped"
    least = min(report["count"] for report in reports.values())
    behind = [report for report in reports.values() if report["count"] == least]
    if len(behind) == size > 1:
        lines = collections.Counter(report["line"] for report in behind)
        behind = [report for report in behind if lines[report["line"]] == min(lines.values())]
    if len(behind) == size > 1:
        return f"all {size} ranks wait at {behind[0]['line']}, after {behind[0]['place']!r}"
    first = behind[0]
    names = ", ".join(f"rank {report['rank']} ({report['host']}, process {report['pid']})" for report in behind)
    return f"{names} held up the run after {first['place']!r}, at {first['line']}"


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _report_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"
