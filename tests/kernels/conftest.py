"""Buffers that megaboat leaves uninitialised start as NaN, so that a row nobody wrote cannot pass a test; and Triton's
interpreter looks only once through triton's modules."""

import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch


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


def _look_once() -> None:
    """At each call of a function, the interpreter looks for the builtins of triton's modules in all of their members:
    a third of the time of these tests."""
    from triton import language as tl
    from triton.runtime import interpreter

    modules = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    builtins = {id(module): inspect.getmembers(module, tl.core.is_builtin) for module in modules}

    def patch_builtin(module: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins[id(module)]:
            if getattr(module, name) is member:
                interpreter._patch_attr(module, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


if os.environ.get("TRITON_INTERPRET") == "1":
    _look_once()
