"""Gradients that meet, on GPUs: each is read once, and what is added in fp32 is rounded once."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


def fan_out_triton(x: Tensor, uses: int) -> tuple[Tensor, ...]:
    """`fan.fan_out`."""
    return _FanOut.apply(x, uses)


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, uses):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(uses))

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        found = [gradient for gradient in gradients if gradient is not None]
        return (add_triton(found) if found else None), None


def add_triton(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape and dtype."""
    if len(parts) == 1:
        return parts[0]
    first, second, *others = [part.contiguous() for part in parts]
    third = others[0] if others else first
    out = torch.empty_like(first)
    if out.numel() > 0:
        grid = (triton.cdiv(out.numel(), BLOCK),)
        add_kernel[grid](first, second, third, out, out.numel(), bool(others), BLOCK, num_warps=8)
    return add_triton([out, *others[1:]])


@triton.jit
def add_kernel(a, b, c, out, size, THREE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.load(a + o, mask=o < size, other=0.0).to(tl.float32)
    b_sum += tl.load(b + o, mask=o < size, other=0.0).to(tl.float32)
    if THREE:
        b_sum += tl.load(c + o, mask=o < size, other=0.0).to(tl.float32)
    tl.store(out + o, b_sum.to(out.dtype.element_ty), mask=o < size)
