"""The table is whole, and names nothing that is gone."""

from tests.probes.__main__ import absent, count_of
from tests.probes.table import PROBES


def test_all_29_are_asked() -> None:
    assert [probe.number for probe in PROBES] == list(range(1, 30))
    assert all(probe.commands for probe in PROBES)


def test_no_test_is_named_that_was_renamed() -> None:
    gone = [why for probe in PROBES for command in probe.commands if " is gone from " in (why := absent(command))]
    assert gone == []


def test_dots_are_counted() -> None:
    assert count_of("..s.F   [ 50%]\n.....   [100%]\nfailed: x") == "8 passed, 1 failed, 1 skipped"
