"""The table is whole, names nothing that is gone, and its verdicts are those of the tests."""

import subprocess
import sys

import pytest

from tests.probes.__main__ import ROOT, absent, chosen_of, verdict_of
from tests.probes.table import PROBES


def test_all_29_are_asked() -> None:
    assert [probe.number for probe in PROBES] == list(range(1, 30))
    assert all(probe.commands for probe in PROBES)


def test_no_test_is_named_that_was_renamed() -> None:
    gone = [why for probe in PROBES for command in probe.commands if " is gone from " in (why := absent(command))]
    assert gone == []


def test_slow_tests_are_asked_where_they_are_named_or_nothing_else_is_there() -> None:
    is_slow = {"a/t.py::one": False, "a/t.py::two[x]": True, "a/t.py::two[y]": True, "b/u.py::one": True}
    assert chosen_of("a/t.py", is_slow) == {"a/t.py::one"}
    assert chosen_of("a/t.py::two", is_slow) == {"a/t.py::two[x]", "a/t.py::two[y]"}
    assert chosen_of("a", is_slow) == {"a/t.py::one"}
    assert chosen_of("b", is_slow) == {"b/u.py::one"}
    assert chosen_of("a/t.py::on", is_slow) == set()


def test_nothing_passed_is_no_answer() -> None:
    assert verdict_of(["passed", "skipped", "passed"]) == ("2 passed, 1 skipped", True)
    assert verdict_of(["passed", "failed"]) == ("1 passed, 1 failed", False)
    assert verdict_of(["skipped"]) == ("1 skipped", False)
    assert verdict_of(["passed", "not run"]) == ("1 passed, 1 not run", False)
    assert verdict_of([]) == ("no test", False)


@pytest.mark.slow
def test_some_are_asked_in_one_session() -> None:
    command = [sys.executable, "-m", "tests.probes", "--only", "5", "12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines[1:]] == ["5", "12"], done.stdout
    assert all(line.endswith("| passed |") for line in lines[1:])
    assert "passed; " in lines[2]
    assert done.returncode == 0
