"""Selective recomputation: what one pass over memory gives again is not kept for the backward pass.

The idea is Megatron's (Korthikanti et al. 2022, section 5). A function that knows how its result comes back offers it;
in `elementwise()` whoever would save that result for its backward pass saves the recipe in its place.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Recipe:
    """How a tensor is made again. It is kept until the last of those who saved it has taken it."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._made: Tensor | None = None
        self.savers = 0

    def tensor(self) -> Tensor:
        if self._made is not None:
            return self._made
        with torch.no_grad():
            made = self._make()
        self._made = made if self.savers > 0 else None
        return made

    def take(self, shape: torch.Size) -> Tensor:
        """For one of the savers."""
        made = self.tensor()
        self.savers -= 1
        if self.savers <= 0:
            self._made = None
        return made.view(shape)


# By storage; the weak reference keeps the address from being given to another one.
Offers = dict[int, tuple[StorageWeakRef, Recipe]]
_offers: ContextVar[Offers | None] = ContextVar("offers", default=None)


@contextmanager
def elementwise() -> Iterator[None]:
    """Save recipes, where there are any, of what is computed here."""
    token = _offers.set({})
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _offers.reset(token)


def offer(out: Tensor, make: Callable[[], Tensor]) -> None:
    """`make()` gives `out` again, bit by bit, whose storage it fills."""
    offers = _offers.get()
    if offers is not None and out.numel():
        storage = out.untyped_storage()
        offers[storage._cdata] = (StorageWeakRef(storage), Recipe(make))


def later(x: Tensor) -> Callable[[], Tensor]:
    """x, for a recipe: itself, or made again."""
    recipe, shape = _find(x), x.shape
    return (lambda: x.detach()) if recipe is None else (lambda: recipe.tensor().view(shape))


def _find(x: Tensor) -> Recipe | None:
    offers = _offers.get()
    if offers is None or not x.numel():
        return None
    storage = x.untyped_storage()
    reference, recipe = offers.get(storage._cdata, (None, None))
    whole = x.is_contiguous() and x.nbytes == storage.nbytes()
    return recipe if reference is not None and not reference.expired() and whole else None


def _pack(x: Tensor) -> Tensor | tuple[Recipe, torch.Size]:
    recipe = _find(x)
    if recipe is None:
        # A function's own result would hold that function, which holds what it saved: for ever, where no backward pass
        # follows, as when memory runs out. A parameter stays itself: ZeRO-3 takes its data away and brings it back.
        return x if x.is_leaf else x.detach()
    recipe.savers += 1
    return recipe, x.shape


def _unpack(saved: Tensor | tuple[Recipe, torch.Size]) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    recipe, shape = saved
    return recipe.take(shape)
