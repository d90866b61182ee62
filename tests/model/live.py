"""Bytes of the tensors that are alive, counted as storages come and go."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is on: `now`, and of buffers of at least `large` bytes their sizes in `large_ones` instead."""

    def __init__(self, large: int = 1 << 62) -> None:
        super().__init__()
        self.now, self.large, self.large_ones = 0, large, []
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return
        if size >= self.large:
            self.large_ones.append(size)
            size = 0
        self._sizes[key] = size
        self.now += size
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
