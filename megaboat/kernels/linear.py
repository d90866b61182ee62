"""Linear maps under mixed precision: products in bf16, gradients of the parameters in fp32 as the product sums them.

Autocast would round the gradient of a weight to bf16 and cast it back, and torch sums a bias's gradient at a third of
the memory's speed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional as F

_copies: ContextVar["NarrowCopies | None"] = ContextVar("copies", default=None)


class NarrowCopies:
    """Parameters in a narrow dtype for all their products, in a few launches where each map casts its own in two.

    Not where each product's copy is to be gone after it, as under activation checkpointing.
    """

    def __init__(self, wide: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._wide = [tensor.detach() for tensor in wide]
        self._narrow = [torch.empty_like(tensor, dtype=dtype) for tensor in self._wide]
        self._places = {id(tensor): i for i, tensor in enumerate(wide)}
        self._joint: dict[tuple[int, ...], Tensor] = {}

    def refresh(self) -> None:
        """Copy again, after the parameters have changed and before the next forward pass."""
        torch._foreach_copy_(self._narrow, self._wide)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Maps that are called here take the copies."""
        token = _copies.set(self)
        try:
            yield
        finally:
            _copies.reset(token)

    def of(self, wide: Sequence[Tensor]) -> Tensor | None:
        """The copy of a parameter, or of several one below the other; None where one of them has none."""
        places = tuple([self._places.get(id(tensor), -1) for tensor in wide])
        if -1 in places:
            return None
        if len(places) == 1:
            return self._narrow[places[0]]
        if places not in self._joint:  # asked for the first time: from now on they are parts of one tensor
            joint = self._joint[places] = torch.cat([self._narrow[i] for i in places])
            for i, part in zip(places, joint.split([len(tensor) for tensor in wide]), strict=True):
                self._narrow[i] = part
        return self._joint[places]


def linear(x: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: (..., D) -> (..., E). x in bf16 or fp16 meets fp32 parameters in its own dtype."""
    if mixes(x, weight_ED):
        return mixed_linear(x, weight_ED, bias_E)
    return F.linear(x, weight_ED, bias_E)


def mixes(x: Tensor, weight_ED: Tensor) -> bool:
    """Whether their product is one of narrow x and fp32 parameters on a GPU."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and weight_ED.dtype == torch.float32


def mixed_linear(x: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """`linear` for x in bf16 or fp16 and fp32 parameters, on any device."""
    return joint_linear(x, [weight_ED], [] if bias_E is None else [bias_E])


def joint_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> Tensor:
    """Several `mixed_linear` of one x as one product each way, side by side: (..., D) -> (..., sum of E).

    biases: one for each weight, or none.
    """
    narrow_E = _narrow(biases, x.dtype) if biases else None
    return _MixedLinear.apply(x, _narrow(weights, x.dtype), narrow_E, *weights, *biases)


def _narrow(wide: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Parameters in `dtype`, one below the other."""
    copies = _copies.get()
    narrow = None if copies is None else copies.of(wide)
    if narrow is not None and narrow.dtype == dtype:
        return narrow
    parts = [tensor.detach() for tensor in wide]
    if len(parts) == 1:
        return parts[0].to(dtype)
    out = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=dtype, device=parts[0].device)
    return torch.cat(parts, out=out)  # casts as it copies


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, narrow_ED, narrow_E, *wide):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, narrow_ED)
        ctx.has_bias = narrow_E is not None
        weights = wide[: len(wide) // 2] if ctx.has_bias else wide
        ctx.rows = [weight.shape[0] for weight in weights]  # `len` of a tensor takes a microsecond
        return F.linear(x, narrow_ED, narrow_E)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        x, narrow_ED = ctx.saved_tensors
        dout_XE, x_XD = dout.flatten(0, -2).contiguous(), x.flatten(0, -2)
        dx = (dout_XE @ narrow_ED).view_as(x) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[3:]):
            return dx, *[None] * (len(ctx.needs_input_grad) - 1)
        sums = [_wide_product(dout_XE.T, x_XD), *([_column_sum(dout_XE)] if ctx.has_bias else [])]
        if len(ctx.rows) > 1:
            sums = [part for each in sums for part in each.split(ctx.rows)]
        return dx, None, None, *sums


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32, without a copy in the narrow dtype where the device's product can write fp32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _column_sum(x_XE: Tensor) -> Tensor:
    """The sum over rows in fp32: (X, E) -> (E,)."""
    if x_XE.is_cuda:
        from megaboat.kernels.linear_triton import column_sum_triton

        return column_sum_triton(x_XE)
    return x_XE.sum(0, dtype=torch.float32)
