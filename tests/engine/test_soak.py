"""The soak of `python -m tests.soak`, for a minute or two."""

from pathlib import Path

import pytest

from tests.soak import soak


@pytest.mark.slow
def test_a_disturbed_run_is_the_undisturbed_one(tmp_path: Path) -> None:
    seen = soak(tmp_path, steps=120, faults=9)
    assert "the ledger is the undisturbed run's" in seen
