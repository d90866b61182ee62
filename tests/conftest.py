"""What every test may rely on."""

import gc
import os
import signal
from collections.abc import Generator, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Imports, until all tests are collected, leave no garbage; looking for it would take a quarter of their time.
gc.disable()

# In the background of a script a process ignores Ctrl-C, and so would every command that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time, and no verdict on how fast a busy machine makes them.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=4, help="how often tests/engine/test_killed.py kills its run")
    parser.addoption("--stops", type=int, default=3, help="how often tests/launch/test_slurm.py stops its job")


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """A command run inside a test may set variables (its rank, its port); the next test sees none of them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        gc.enable()


# Minutes each, and so that none of them begins when the other workers are nearly done.
LONGEST = ("test_slurm.py", "test_readme.py", "test_study.py", "test_equality.py", "test_interpreter.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin first, then those with slow tests, beside which the others find their time; `gpu` needs
    a CUDA device."""
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: (item.path.name not in LONGEST, item.path not in slow))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
