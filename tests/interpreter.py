"""Triton's interpreter, faster."""

import inspect
from typing import Any


def look_once() -> None:
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
