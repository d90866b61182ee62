"""A run that makes no progress ends and says which rank held it up, with the stacks of all ranks.

Every rank counts the same moments of its loop (`beat`). When one sleeps, the others soon wait for it in a collective,
some moments further on: the rank with the lowest count is the one. Each rank writes its count and stacks to a file of
its own, since a stuck job cannot communicate. A rank that loses contact to another one does so at once, and the others
follow when they see its file: what gives no report then is the dead one.
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
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from megaboat.engine.ranks import Ranks
from megaboat.log import get_logger

EXIT_CODE = 5
REPORT_SECONDS = 10.0  # ranks beat at slightly different times: until all have written their file
LOOK_SECONDS = 3.0  # between looks for reports of other ranks

T = TypeVar("T")


class Watchdog:
    """Watches this rank from a thread while the context is open; `seconds` 0 watches nothing."""

    def __init__(self, folder: Path, ranks: Ranks, seconds: float, report_seconds: float = REPORT_SECONDS) -> None:
        self._folder, self._ranks, self._seconds = folder / "hang", ranks, seconds
        self._report_seconds = report_seconds
        self._count, self._place, self._time = 0, "start", time.monotonic()
        self._main = threading.get_ident()
        self._attempt = ""
        self._ending = threading.Lock()
        for stale in self._folder.glob("rank-*.json") if ranks.is_first else [_report_path(self._folder, ranks.rank)]:
            stale.unlink(missing_ok=True)

    def __enter__(self) -> "Watchdog":
        self._over = threading.Event()
        self.beat("start")
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def name_attempt(self) -> None:
        """Once the ranks are connected: agree on a name for this attempt. Reports of earlier ones may lie in the
        folder, and their times tell nothing: clocks jump, and differ."""
        self._attempt = self._ranks.gather_objects(uuid.uuid4().hex)[0]

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
        look = 0.0
        while not over.wait(min(1.0, self._seconds / 10)):
            if time.monotonic() - self._time > self._seconds:
                self._end(f"no progress for {self._seconds:g} s")
            if self._attempt and time.monotonic() > look:
                look = time.monotonic() + LOOK_SECONDS
                if read_reports(self._folder, self._attempt):
                    self._end("another rank has given up")

    def lost(self, error: Exception) -> NoReturn:
        """Contact to another rank is lost: end this process as if it had waited in vain, but now."""
        self._end(f"lost contact to another rank ({str(error).splitlines()[0]})")

    def _end(self, why: str) -> NoReturn:
        """Write what this rank does, wait for the others' files, name the rank, end the process."""
        self._ending.acquire()  # for good: the thread or the main one, not both
        self._folder.mkdir(parents=True, exist_ok=True)
        report = {
            "attempt": self._attempt,
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
        reports = read_reports(self._folder, self._attempt)
        if reports and min(reports) == self._ranks.rank:
            message = f"{why}: {verdict(reports, self._ranks.size)}"
            get_logger().error("%s; stacks of all ranks are in %s", message, self._folder)
            for handler in get_logger().handlers:
                handler.flush()
        os._exit(EXIT_CODE)  # the main thread hangs, or would in the next collective: nothing gentler ends it

    def _innermost(self) -> str:
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return "unknown"
        last = traceback.extract_stack(frame)[-1]
        return f"{last.filename}:{last.lineno} in {last.name}"


def read_reports(folder: Path, attempt: str) -> dict[int, dict[str, Any]]:
    """The reports of an attempt by rank; a rank that cannot run Python has none."""
    reports = {}
    for path in folder.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            report = json.loads(path.read_text())
            if report["attempt"] == attempt:
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
