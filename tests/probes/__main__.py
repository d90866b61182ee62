"""Ask the 29 questions of a first hour, and print what was seen.

python -m tests.probes                   all of them
python -m tests.probes --only 3 16 29    some
python -m tests.probes --list            the questions and commands, without running them

All tests run in one pytest session, each once however many questions it answers: a line of the table is printed as soon
as its last test has ended; what pytest says goes to stderr.
"""

import argparse
import contextlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from megaboat.cli import COMMANDS
from tests.probes.table import PROBES, Probe

ROOT = Path(__file__).parents[2]


def is_test(command: str) -> bool:
    return not command.startswith("python ")


def absent(command: str) -> str:
    """Why a command cannot be run yet; empty if it can."""
    if not is_test(command):
        name = command.split()[3]
        return "" if name in COMMANDS else f"`megaboat {name}` is not built"
    file, _, test = command.partition("::")
    path = ROOT / file
    if not path.exists():
        return f"{file} is not built"
    return "" if not test or f"def {test}(" in path.read_text() else f"{test} is gone from {file}"


def holds(command: str, test: str) -> bool:
    """Whether a test, by its pytest id, is among those that a command names: a folder, a file or a function."""
    return test == command or test.startswith((f"{command}/", f"{command}::", f"{command}["))


def chosen_of(command: str, is_slow: dict[str, bool]) -> set[str]:
    """The tests of a command: without the slow ones, unless all of them are."""
    named = {test for test in is_slow if holds(command, test)}
    return {test for test in named if not is_slow[test]} or named


def ask(command: str) -> tuple[str, bool]:
    """Run a command of the `megaboat` CLI: the last thing that it said, and whether it passed."""
    words = command.split()
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in (done.stdout or done.stderr).strip().splitlines() if line.strip()]
    return re.sub(r"=+ ?| ?=+", "", lines[-1]) if lines else "nothing", done.returncode == 0


def verdict_of(outcomes: Iterable[str]) -> tuple[str, bool]:
    """How many tests passed, failed, were skipped or never ran, and whether that answers a question: at least one must
    have passed, and the others been skipped."""
    counts = Counter(outcomes)
    seen = ", ".join(f"{counts[word]} {word}" for word in ("passed", "failed", "skipped", "not run") if counts[word])
    return seen or "no test", counts["passed"] > 0 and not counts["failed"] + counts["not run"]


class Session:
    """A pytest plugin: keeps the tests that some probe names, and prints a probe when its tests have ended."""

    def __init__(self, probes: list[Probe]) -> None:
        self._waiting = list(probes)
        self._tests: dict[str, set[str]] = {}
        self._outcomes: dict[str, str] = {}
        self._ended: set[str] = set()
        self._out = sys.stdout
        self.failed = 0

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        is_slow = {item.nodeid: item.get_closest_marker("slow") is not None for item in items}
        commands = {command for probe in self._waiting for command in probe.commands if is_test(command)}
        self._tests = {command: chosen_of(command, is_slow) for command in commands}
        wanted = set().union(*self._tests.values())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
        items[:] = [item for item in items if item.nodeid in wanted]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed" or report.when == "call":
            worst = self._outcomes.get(report.nodeid) == "failed"
            self._outcomes[report.nodeid] = "failed" if worst else report.outcome

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._ended.add(nodeid)
        self.show()

    def show(self, everything: bool = False) -> None:
        """Print the probes whose tests have ended; at the end, those too whose tests never came."""
        for probe in list(self._waiting):
            tests = set().union(*(self._tests.get(command, set()) for command in probe.commands))
            if everything or tests <= self._ended:
                self._waiting.remove(probe)
                self._print(probe)

    def _print(self, probe: Probe) -> None:
        gone = [why for why in map(absent, probe.commands) if why]
        results = [] if gone else [self._answer(command) for command in probe.commands]
        passed = bool(results) and all(passed for _, passed in results)
        self.failed += not passed
        verdict = "not built" if gone else "passed" if passed else "FAILED"
        seen = "; ".join(gone or [seen for seen, _ in results])
        print(line_of(probe, seen, verdict), file=self._out, flush=True)

    def _answer(self, command: str) -> tuple[str, bool]:
        if not is_test(command):
            return ask(command)
        tests = self._tests.get(command, set())
        return verdict_of(self._outcomes.get(test, "not run") for test in tests)


def line_of(probe: Probe, seen: str = "", verdict: str = "") -> str:
    only = f" (on a GPU only: {probe.gpu})" if probe.gpu else ""
    commands = "<br>".join(f"`{command}`" for command in probe.commands)
    return f"| {probe.number} | {probe.question}{only} | {commands} | {seen} | {verdict} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", type=int, metavar="N", help="some of the questions")
    parser.add_argument("--list", action="store_true", help="run nothing")
    chosen = parser.parse_args()
    probes = [probe for probe in PROBES if not chosen.only or probe.number in chosen.only]
    print("| | question | command | seen | |\n|---|---|---|---|---|", flush=True)
    if chosen.list:
        print("\n".join(map(line_of, probes)))
        return 0
    session = Session(probes)
    named = [command for probe in probes for command in probe.commands if is_test(command) and not absent(command)]
    if named:
        paths = [str(ROOT / command) for command in dict.fromkeys(named)]
        with contextlib.redirect_stdout(sys.stderr):
            pytest.main(["--rootdir", str(ROOT), "-m", "", *paths], plugins=[session])
    session.show(everything=True)
    return 1 if session.failed else 0


if __name__ == "__main__":
    sys.exit(main())
