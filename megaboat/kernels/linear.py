"""Linear maps under mixed precision: products in bf16, gradients of the parameters in fp32 as the product sums them.

Autocast would round the gradient of a weight to bf16 and cast it back, and torch sums a bias's gradient at a third of
the memory's speed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional as F

_copies: ContextVar[Mapping[int, Tensor] | None] = ContextVar("copies", default=None)  # by the id of the wide tensor


class NarrowCopies:
    """Parameters in a narrow dtype for all their products, in a few launches where each map casts its own in two.

    Not where each product's copy is to be gone after it, as under activation checkpointing.
    """

    def __init__(self, wide: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._wide = [tensor.detach() for tensor in wide]
        self._narrow = [torch.empty_like(tensor, dtype=dtype) for tensor in self._wide]
        self._by_id = {id(tensor): narrow for tensor, narrow in zip(wide, self._narrow, strict=True)}

    def refresh(self) -> None:
        """Copy again, after the parameters have changed and before the next forward pass."""
        torch._foreach_copy_(self._narrow, self._wide)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Maps that are called here take the copies."""
        token = _copies.set(self._by_id)
        try:
            yield
        finally:
            _copies.reset(token)


def linear(x: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: (..., D) -> (..., E). x in bf16 or fp16 meets fp32 parameters in its own dtype."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and weight_ED.dtype == torch.float32:
        return mixed_linear(x, weight_ED, bias_E)
    return F.linear(x, weight_ED, bias_E)


def mixed_linear(x: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """`linear` for x in bf16 or fp16 and fp32 parameters, on any device."""
    return _MixedLinear.apply(x, weight_ED, bias_E, _narrow(weight_ED, x.dtype), _narrow(bias_E, x.dtype))


def _narrow(wide: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if wide is None:
        return None
    narrow = (_copies.get() or {}).get(id(wide))
    return wide.detach().to(dtype) if narrow is None or narrow.dtype != dtype else narrow


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_ED, bias_E, narrow_ED, narrow_E):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, narrow_ED)
        ctx.has_bias = bias_E is not None
        return F.linear(x, narrow_ED, narrow_E)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        x, narrow_ED = ctx.saved_tensors
        dout_XE, x_XD = dout.flatten(0, -2).contiguous(), x.flatten(0, -2)
        dx = (dout_XE @ narrow_ED).view_as(x) if ctx.needs_input_grad[0] else None
        dweight_ED = _wide_product(dout_XE.T, x_XD) if ctx.needs_input_grad[1] else None
        return dx, dweight_ED, _column_sum(dout_XE) if ctx.has_bias else None, None, None


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32, without a copy in the narrow dtype where the device's product can write fp32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _column_sum(x_XE: Tensor) -> Tensor:
    """The sum over rows in fp32: (X, E) -> (E,)."""
    if x_XE.is_cuda:
        from megaboat.kernels.linear_triton import column_sum_triton

        return column_sum_triton(x_XE)
    return x_XE.sum(0, dtype=torch.float32)
