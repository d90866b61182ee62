"""A tensor with several uses, whose gradients meet in one pass."""

import torch
from torch import Tensor


def fan_out(x: Tensor, uses: int) -> tuple[Tensor, ...]:
    """x, once for each use. Left to autograd, the gradients of n uses would be added in n - 1 passes."""
    if not x.is_cuda:
        return (x,) * uses
    return _FanOut.apply(x, uses)


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, uses):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(uses))

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        from megaboat.kernels.fan_triton import add_triton

        found = [gradient for gradient in gradients if gradient is not None]
        return (add_triton(found) if found else None), None
