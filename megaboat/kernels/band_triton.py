"""Softmax over a band's rows on GPUs, and its gradient: a program takes one row, two passes over it each."""

# mypy: ignore-errors

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaboat.kernels.sizes import next_power_of_2

if TYPE_CHECKING:
    from megaboat.kernels.band import Band

COLUMNS = 512  # at a time: the second pass finds in the cache what the first one read


def band_softmax_triton(scores: Tensor, band: "Band", cu_seqlens: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`band._weights` from fp32 scores in band storage."""
    weights = torch.empty_like(scores, dtype=dtype)
    if band.R > 0:
        band_softmax_kernel[(band.R,)](
            scores, weights, cu_seqlens, len(cu_seqlens), band.R, band.window, scale, band.span, band.block,
            band.blocks * band.block, COLUMNS, next_power_of_2(len(cu_seqlens)),
        )  # fmt: skip
    return weights


def band_softmax_backward_triton(weights: Tensor, dweights: Tensor, band: "Band", scale: float) -> Tensor:
    """`band._softmax_backward` for fp32 `dweights`."""
    if band.R > 0:
        band_softmax_bwd_kernel[(band.R,)](weights, dweights, band.window, scale, band.reach, COLUMNS)
    return weights


@triton.jit
def band_softmax_kernel(
    scores, weights, borders, S, R, window, scale, span, block, tail, BK: tl.constexpr, BS: tl.constexpr
):
    i_q = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BS)
    b_border = tl.load(borders + o_s, mask=o_s < S, other=0)
    first = tl.maximum(tl.max(tl.where(b_border <= i_q, b_border, 0), axis=0), i_q - window)
    row = span + block + i_q * 2 * (span + block)
    # The columns that some tile holds, all of which must be written: a product reads the zeros too.
    low = tl.maximum(i_q - span - block + 1, 0)
    high = i_q - i_q % block + block
    high = tl.minimum(tl.where(i_q >= tail, R, tl.where(i_q < span, span, high)), R)
    o_k = tl.arange(0, BK)
    b_most = tl.full([BK], -float("inf"), tl.float32)
    b_sum = tl.zeros([BK], tl.float32)
    for i_k in range(first, i_q + 1, BK):
        b_score = tl.load(scores + row + i_k + o_k, mask=i_k + o_k <= i_q, other=-float("inf")) * scale
        b_new = tl.maximum(b_most, b_score)
        b_new = tl.maximum(b_new, -3e38)  # no lane is without a number: inf - inf is none
        b_sum = b_sum * tl.exp(b_most - b_new) + tl.exp(b_score - b_new)
        b_most = b_new
    most = tl.max(b_most, axis=0)
    total = tl.sum(b_sum * tl.exp(b_most - most), axis=0)
    for i_k in range(low, high, BK):
        seen = (i_k + o_k >= first) & (i_k + o_k <= i_q)
        b_score = tl.load(scores + row + i_k + o_k, mask=seen, other=-float("inf")) * scale
        b_weight = tl.exp(b_score - most) / total
        tl.store(weights + row + i_k + o_k, b_weight.to(weights.dtype.element_ty), mask=i_k + o_k < high)


@triton.jit
def band_softmax_bwd_kernel(weights, dweights, window, scale, reach, BK: tl.constexpr):
    i_q = tl.program_id(0).to(tl.int64)
    first = tl.maximum(i_q - window, 0)
    row = reach + i_q * 2 * reach
    o_k = tl.arange(0, BK)
    b_along = tl.zeros([BK], tl.float32)
    for i_k in range(first, i_q + 1, BK):
        seen = i_k + o_k <= i_q
        b_weight = tl.load(weights + row + i_k + o_k, mask=seen, other=0.0).to(tl.float32)
        b_along += b_weight * tl.load(dweights + row + i_k + o_k, mask=seen, other=0.0)
    along = tl.sum(b_along, axis=0)
    for i_k in range(first, i_q + 1, BK):
        seen = i_k + o_k <= i_q
        b_weight = tl.load(weights + row + i_k + o_k, mask=seen, other=0.0).to(tl.float32)
        b_dweight = tl.load(dweights + row + i_k + o_k, mask=seen, other=0.0)
        b_dscore = b_weight * (b_dweight - along) * scale
        tl.store(weights + row + i_k + o_k, b_dscore.to(weights.dtype.element_ty), mask=seen)
