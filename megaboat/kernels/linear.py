"""Linear maps under mixed precision: products in bf16, gradients of the parameters in fp32 as the product sums them.

Autocast would round the gradient of a weight to bf16 and cast it back, and torch sums a bias's gradient at a third of
the memory's speed.

Where only the device knows the number of rows, they are the one group of a grouped product: no wait, and no work for
rows that are not used. Gradients of the weight are rounded to bf16 there.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None, used: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: (..., D) -> (..., E). x in bf16 or fp16 meets fp32 parameters in its own dtype.

    used: int32 (1,) on the device, how many rows of x (R, D) are of use; the others are finite, and so is what comes of
    them, and their gradients are zero. For the time being all rows are multiplied: `mixed_linear` can follow the
    number, but with it a captured step's gradients differed from the model's on a GPU, and which of the two was wrong
    is not known.
    """
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and weight_ED.dtype == torch.float32:
        return mixed_linear(x, weight_ED, bias_E)
    return F.linear(x, weight_ED, bias_E)


def mixed_linear(x: Tensor, weight_ED: Tensor, bias_E: Tensor | None, used: Tensor | None = None) -> Tensor:
    """`linear` for x in bf16 or fp16 and fp32 parameters, on any device.

    With `used` by a grouped product, whose time follows it: bf16 on Hopper and newer, D and E multiples of 8.
    """
    return _MixedLinear.apply(x, weight_ED, bias_E, used)


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_ED, bias_E, used):  # type: ignore[no-untyped-def]
        narrow_ED = weight_ED.to(x.dtype)
        ctx.save_for_backward(x, narrow_ED, used)
        ctx.has_bias = bias_E is not None
        if used is not None:
            return _finish(F.grouped_mm(x, narrow_ED.T[None], offs=used), bias_E, used)
        return F.linear(x, narrow_ED, bias_E.to(x.dtype) if ctx.has_bias else None)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        x, narrow_ED, used = ctx.saved_tensors
        dout_XE, x_XD = dout.flatten(0, -2).contiguous(), x.flatten(0, -2)
        dx, dweight_ED = None, None
        if ctx.needs_input_grad[0] and used is None:
            dx = (dout_XE @ narrow_ED).view_as(x)
        elif ctx.needs_input_grad[0]:
            dx = _finish(F.grouped_mm(dout_XE, narrow_ED[None], offs=used), None, used)
        if ctx.needs_input_grad[1] and used is None:
            dweight_ED = _wide_product(dout_XE.T, x_XD)
        elif ctx.needs_input_grad[1]:
            # Of no rows some devices make no zero (pytorch issue 172439); the first row's gradient is zero then.
            some = used.clamp_min(1)
            dweight_ED = F.grouped_mm(dout_XE.T, x_XD, offs=some)[0].float()
        return dx, dweight_ED, _column_sum(dout_XE) if ctx.has_bias else None, None


def _finish(out_RE: Tensor, bias_E: Tensor | None, used: Tensor) -> Tensor:
    """A grouped product's rows plus the bias; zeros in those that it left unwritten."""
    if out_RE.is_cuda:
        from megaboat.kernels.linear_triton import finish_triton

        return finish_triton(out_RE, bias_E, used)
    unused_R1 = (torch.arange(len(out_RE), device=out_RE.device) >= used)[:, None]
    return (out_RE if bias_E is None else out_RE + bias_E.to(out_RE.dtype)).masked_fill(unused_R1, 0)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32, without a copy in the narrow dtype where the device's product can write fp32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _column_sum(x_XE: Tensor) -> Tensor:
    """The sum over rows in fp32: (X, E) -> (E,)."""
    if x_XE.is_cuda:
        from megaboat.kernels.linear_triton import column_sum_triton

        return column_sum_triton(x_XE)
    return x_XE.sum(0, dtype=torch.float32)
