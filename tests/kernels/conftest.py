"""Buffers that megaboat leaves uninitialised start as NaN, so that a row nobody wrote cannot pass a test."""

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.interpreter import look_once


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("megaboat"):
            out.fill_(float("nan") if out.is_floating_point() else 85)
        return out

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    torch.manual_seed(0)


if os.environ.get("TRITON_INTERPRET") == "1":
    look_once()
