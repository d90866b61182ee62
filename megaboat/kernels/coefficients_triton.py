"""MD-EMA's coefficients on GPUs: one launch each way."""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaboat.kernels.sizes import cdiv

BLOCK = 1024


def damped_coefficients_triton(
    smoothing_DN: Tensor, damping_DN: Tensor, expansion_DN: Tensor, projection_DN: Tensor
) -> tuple[Tensor, Tensor]:
    """`coefficients.damped_coefficients` for fp32."""
    return _Coefficients.apply(smoothing_DN, damping_DN, expansion_DN, projection_DN)


class _Coefficients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *parameters):
        parameters = [parameter.contiguous() for parameter in parameters]
        ctx.save_for_backward(*parameters)
        D, N = parameters[0].shape
        decay_DN, weight_DN = torch.empty_like(parameters[0]), torch.empty_like(parameters[0])
        coefficients_fwd_kernel[(cdiv(D * N, BLOCK),)](*parameters, decay_DN, weight_DN, D * N, N**-0.5, BLOCK)
        return decay_DN, weight_DN

    @staticmethod
    def backward(ctx, ddecay_DN, dweight_DN):
        parameters = ctx.saved_tensors
        D, N = parameters[0].shape
        gradients = parameters[0].new_empty(4, D, N).unbind()
        coefficients_bwd_kernel[(cdiv(D * N, BLOCK),)](
            *parameters, ddecay_DN, dweight_DN, *gradients, D * N, N, *ddecay_DN.stride(), *dweight_DN.stride(),
            N**-0.5, BLOCK,
        )  # fmt: skip
        return gradients


@triton.jit
def coefficients_fwd_kernel(smoothing, damping, expansion, projection, decay, weight, size, scale, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_p = tl.sigmoid(tl.load(smoothing + o, mask=m, other=0.0))
    b_product = tl.load(expansion + o, mask=m, other=0.0) * tl.load(projection + o, mask=m, other=0.0)
    tl.store(decay + o, 1 - b_p * tl.sigmoid(tl.load(damping + o, mask=m, other=0.0)), mask=m)
    tl.store(weight + o, b_p * b_product * scale, mask=m)


@triton.jit
def coefficients_bwd_kernel(
    smoothing, damping, expansion, projection, ddecay, dweight, dsmoothing, ddamping, dexpansion, dprojection,
    size, N, ddecay_d, ddecay_n, dweight_d, dweight_n, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_p = tl.sigmoid(tl.load(smoothing + o, mask=m, other=0.0))
    b_d = tl.sigmoid(tl.load(damping + o, mask=m, other=0.0))
    b_expansion = tl.load(expansion + o, mask=m, other=0.0)
    b_projection = tl.load(projection + o, mask=m, other=0.0)
    o_d, o_n = o // N, o % N  # gradients come transposed from `ema_bwd`: a copy of each would be a launch more
    b_ddecay = tl.load(ddecay + o_d * ddecay_d + o_n * ddecay_n, mask=m, other=0.0)
    b_dweight = tl.load(dweight + o_d * dweight_d + o_n * dweight_n, mask=m, other=0.0) * scale
    b_dp = b_dweight * b_expansion * b_projection - b_ddecay * b_d
    tl.store(dsmoothing + o, b_dp * b_p * (1 - b_p), mask=m)
    tl.store(ddamping + o, -b_ddecay * b_p * b_d * (1 - b_d), mask=m)
    tl.store(dexpansion + o, b_dweight * b_p * b_projection, mask=m)
    tl.store(dprojection + o, b_dweight * b_p * b_expansion, mask=m)
