"""A tensor with several uses, whose gradients meet in one pass."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class SideGradients:
    """Gradients of a fanned-out (X, D) that come in a form of their own and are filled up only where all uses meet.

    Autograd would take one of active rows as (X, D) with zeros, and multiply out one of a thin linear map.
    """

    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(dy_RD, row_X): row row_X[x] of the first, where that is not -1."""
    thin: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(dm_XM, weight_KD): the product of the first with the differences of the second, see `margin.margins`."""


def side_gradients(x: Tensor) -> SideGradients | None:
    """Where uses of x may leave such gradients; None where autograd adds them all."""
    return SideGradients() if x.is_cuda else None


def fan_out(x: Tensor, uses: int, side: SideGradients | None = None) -> tuple[Tensor, ...]:
    """x, once for each use. Left to autograd, the gradients of n uses would be added in n - 1 passes.

    A use that leaves its gradient in `side` sends none through autograd.
    """
    if x.is_cuda:
        from megaboat.kernels.fan_triton import fan_out_triton

        return fan_out_triton(x, uses, side)
    return (x,) * uses
