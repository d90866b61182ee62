"""Softmax cross-entropy of a chunk of logits: loss and gradient in two reads and one write, in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaboat.kernels.sizes import next_power_of_2

LOWEST = tl.constexpr(-1e38)  # of absent logits; with -inf a lane that sees none would compute inf - inf


def cross_entropy_triton(logits_XV: Tensor, targets_X: Tensor, ignore_index: int) -> Tensor:
    """Negative log-likelihoods (X,) in fp32; `logits_XV` becomes its own gradient, softmax minus one-hot."""
    X, V = logits_XV.shape
    nll_X = logits_XV.new_empty(X, dtype=torch.float32)
    BV = min(next_power_of_2(V), 4096)
    cross_entropy_kernel[(X,)](logits_XV, targets_X, nll_X, V, ignore_index, BV, num_warps=8)
    return nll_X


@triton.jit
def cross_entropy_kernel(logits, targets, nll, V, ignore_index, BV: tl.constexpr):  # type: ignore[no-untyped-def]
    i_x = tl.program_id(0).to(tl.int64)
    p_row = logits + i_x * V
    target = tl.load(targets + i_x)
    scored = target != ignore_index
    # One pass for the maximum and the sum, lane by lane, so that lanes meet only once at the end.
    b_max = tl.full([BV], LOWEST, tl.float32)
    b_sum = tl.zeros([BV], tl.float32)
    for v in range(0, V, BV):
        o_v = v + tl.arange(0, BV)
        b_logit = tl.load(p_row + o_v, mask=o_v < V, other=LOWEST).to(tl.float32)
        b_new = tl.maximum(b_max, b_logit)
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.exp(b_logit - b_new)
        b_max = b_new
    top = tl.max(b_max, axis=0)
    # Kept apart from `top`: their sum would round away digits that the small probabilities need.
    log_sum = tl.log(tl.sum(b_sum * tl.exp(b_max - top), axis=0))
    picked = tl.load(p_row + tl.where(scored, target, 0)).to(tl.float32)
    tl.store(nll + i_x, tl.where(scored, log_sum - (picked - top), 0.0))
    for v in range(0, V, BV):
        o_v = v + tl.arange(0, BV)
        b_logit = tl.load(p_row + o_v, mask=o_v < V, other=LOWEST).to(tl.float32)
        b_gradient = tl.exp(b_logit - top - log_sum) - tl.where(o_v == target, 1.0, 0.0)
        tl.store(p_row + o_v, tl.where(scored, b_gradient, 0.0).to(logits.dtype.element_ty), mask=o_v < V)
