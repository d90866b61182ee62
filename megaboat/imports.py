"""Imports that take seconds."""

import gc
import importlib
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


def load(name: str) -> ModuleType:
    """Import a module without looking for garbage, which would be a quarter of the time: imports leave none.

    Ctrl-C waits until it is there: packages that try an import and take any exception for its failure would swallow it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with _uninterrupted():
            return importlib.import_module(name)
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """What Ctrl-C does is done afterwards. Not by the mask of signals, which holds for one thread of the process."""
    if threading.current_thread() is not threading.main_thread():  # where Ctrl-C never arrives
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)
