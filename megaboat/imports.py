"""Imports that take seconds."""

import gc
import importlib
from types import ModuleType


def load(name: str) -> ModuleType:
    """Import a module without looking for garbage, which would be a quarter of the time: imports leave none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if was_enabled:
            gc.enable()
