"""Confidences on GPUs: one launch forward and two backward, where torch takes four and ten on small tensors."""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaboat.kernels.sizes import cdiv

BLOCK = 1024


def confidences_triton(margin_XM: Tensor, log_temperature_M: Tensor, active_XM: Tensor) -> Tensor:
    """`confidence.confidences` for fp32. Deterministic: sums of programs, then one over programs."""
    return _Confidences.apply(margin_XM, log_temperature_M, active_XM)


class _Confidences(torch.autograd.Function):
    @staticmethod
    def forward(ctx, margin_XM, log_temperature_M, active_XM):
        margin_XM, active_XM = margin_XM.contiguous(), active_XM.contiguous()
        X, M = margin_XM.shape
        out_XM = torch.empty_like(margin_XM)
        if X > 0:
            confidence_fwd_kernel[(cdiv(X, BLOCK), M)](margin_XM, log_temperature_M, active_XM, out_XM, X, M, BLOCK)
        ctx.save_for_backward(margin_XM, log_temperature_M, active_XM)
        return out_XM

    @staticmethod
    def backward(ctx, dout_XM):
        margin_XM, log_temperature_M, active_XM = ctx.saved_tensors
        X, M = margin_XM.shape
        dmargin_XM = torch.empty_like(margin_XM)
        partial_PM = margin_XM.new_empty(cdiv(X, BLOCK), M)
        if X > 0:
            confidence_bwd_kernel[(cdiv(X, BLOCK), M)](
                margin_XM, log_temperature_M, active_XM, dout_XM.contiguous(), dmargin_XM, partial_PM, X, M, BLOCK
            )
        return dmargin_XM, partial_PM.sum(0), None


@triton.jit
def confidence_fwd_kernel(margin, log_temperature, active, out, X, M, BLOCK: tl.constexpr):
    i_m = tl.program_id(1)
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o = o_x * M + i_m
    temperature = tl.exp(tl.load(log_temperature + i_m))
    b_confidence = tl.sigmoid(tl.load(margin + o, mask=o_x < X, other=0.0) / temperature)
    b_active = tl.load(active + o, mask=o_x < X, other=0)
    tl.store(out + o, tl.where(b_active != 0, b_confidence, 0.0), mask=o_x < X)


@triton.jit
def confidence_bwd_kernel(margin, log_temperature, active, dout, dmargin, partial, X, M, BLOCK: tl.constexpr):
    i_m = tl.program_id(1)
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o = o_x * M + i_m
    temperature = tl.exp(tl.load(log_temperature + i_m))
    b_logit = tl.load(margin + o, mask=o_x < X, other=0.0) / temperature
    b_active = tl.load(active + o, mask=o_x < X, other=0)
    b_sigmoid = tl.sigmoid(b_logit)
    b_dlogit = tl.load(dout + o, mask=o_x < X, other=0.0) * b_sigmoid * (1 - b_sigmoid)
    b_dlogit = tl.where(b_active != 0, b_dlogit, 0.0)
    tl.store(dmargin + o, b_dlogit / temperature, mask=o_x < X)
    tl.store(partial + tl.program_id(0) * M + i_m, -tl.sum(b_dlogit * b_logit, axis=0))
