"""Runs the Triton tests on the CPU: the interpreter must be chosen before triton is first imported, so in a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_triton_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    paths = map(str, sorted(HERE.glob("test_*_triton.py")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rN", "-p", "no:cacheprovider", "-m", "not gpu", *paths],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout, done.stdout[-1000:]
    assert " passed" in done.stdout
