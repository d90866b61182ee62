"""Imports that take seconds: what happens meanwhile."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megaboat.imports import load

CAREFUL = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    sum(range(1000))
except BaseException:
    raise SystemExit("swallowed")
"""


def test_an_interrupt_during_an_import_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread of the process gets the signal."""
    (tmp_path / "careful.py").write_text(CAREFUL)
    monkeypatch.syspath_prepend(tmp_path)
    with ThreadPoolExecutor() as others:
        others.submit(int).result()
        with pytest.raises(KeyboardInterrupt):
            load("careful")
        assert others.submit(load, "careful").result() is sys.modules["careful"]
    assert gc.isenabled()
