"""A tensor with several uses, whose gradients meet in one pass."""

from torch import Tensor


def fan_out(x: Tensor, uses: int) -> tuple[Tensor, ...]:
    """x, once for each use. Left to autograd, the gradients of n uses would be added in n - 1 passes."""
    if x.is_cuda:
        from megaboat.kernels.fan_triton import fan_out_triton

        return fan_out_triton(x, uses)
    return (x,) * uses
