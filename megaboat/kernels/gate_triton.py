"""SiLU gates on GPUs: three tensors moved forward and five backward, where torch moves five and nine."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaboat.kernels.sizes import cdiv

BLOCK = 2048


def silu_gate_triton(a: Tensor, b: Tensor) -> Tensor:
    """`gate.silu_gate` for bf16, fp16 and fp32."""
    return _SiluGate.apply(a, b)


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):  # type: ignore[no-untyped-def]
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        out = torch.empty_like(a)
        if a.numel() > 0:
            gate_fwd_kernel[(cdiv(a.numel(), BLOCK),)](a, b, out, a.numel(), BLOCK)
        return out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        a, b = ctx.saved_tensors
        da, db = torch.empty_like(a), torch.empty_like(b)
        if a.numel() > 0:
            grid = (cdiv(a.numel(), BLOCK),)
            gate_bwd_kernel[grid](a, b, dout.contiguous(), da, db, a.numel(), BLOCK)
        return da, db


@triton.jit
def gate_fwd_kernel(a, b, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_a = tl.load(a + o, mask=o < size, other=0.0).to(tl.float32)
    b_b = tl.load(b + o, mask=o < size, other=0.0).to(tl.float32)
    tl.store(out + o, (b_a * tl.sigmoid(b_a) * b_b).to(out.dtype.element_ty), mask=o < size)


@triton.jit
def gate_bwd_kernel(a, b, dout, da, db, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_a = tl.load(a + o, mask=o < size, other=0.0).to(tl.float32)
    b_b = tl.load(b + o, mask=o < size, other=0.0).to(tl.float32)
    b_dout = tl.load(dout + o, mask=o < size, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_a)
    b_slope = b_sigmoid * (1 + b_a * (1 - b_sigmoid))
    tl.store(da + o, (b_dout * b_b * b_slope).to(da.dtype.element_ty), mask=o < size)
    tl.store(db + o, (b_dout * b_a * b_sigmoid).to(db.dtype.element_ty), mask=o < size)
