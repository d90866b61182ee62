"""Imports that take seconds."""

import gc
import importlib
import signal
from types import ModuleType


def load(name: str) -> ModuleType:
    """Import a module without looking for garbage, which would be a quarter of the time: imports leave none.

    Ctrl-C waits until it is there: packages that try an import and take any exception for its failure would swallow it.
    """
    was_enabled, was_blocked = gc.isenabled(), signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if was_enabled:
            gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, was_blocked)
