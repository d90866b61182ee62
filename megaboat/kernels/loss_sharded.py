"""Cross-entropy of a linear head whose vocabulary is cut over several holders, each with some rows of the weight.

The logits stay where their rows are. What travels is two numbers a token and holder: the log of the sum of its
exponentials, and the logit of the target where the holder has it. Letters: P holders, V here the holder's own rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megaboat.kernels import loss

Together = Callable[[Tensor], Tensor]
"""The tensors of all holders, equal in shape, stacked in front: (...) -> (P, ...)."""


def sharded_cross_entropy(
    h_XD: Tensor, weight_VD: Tensor, targets_X: Tensor, first: int, together: Together, ignore_index: int = -100
) -> Tensor:
    """`loss.linear_cross_entropy` where this holder has the rows first..first+V of the vocabulary.

    The sum is the same at every holder. The gradient of h_XD is this holder's part: the caller adds the parts up.
    """
    return _ShardedCrossEntropy.apply(h_XD, weight_VD, targets_X, first, together, ignore_index)


@torch.no_grad()
def sharded_token_nll(
    h_XD: Tensor, weight_VD: Tensor, targets_X: Tensor, first: int, together: Together, ignore_index: int = -100
) -> Tensor:
    """`loss.token_nll` where this holder has the rows first..first+V of the vocabulary."""
    parts = []
    size = loss.chunk(len(weight_VD))
    for h, targets in zip(h_XD.split(size), targets_X.split(size), strict=True):
        logits_XV = _wide_logits(h, weight_VD.to(h.dtype))
        normaliser_X, target_X = _combine(logits_XV, targets - first, together)
        parts.append((normaliser_X - target_X) * (targets != ignore_index))
    return torch.cat(parts)


def _wide_logits(h_XD: Tensor, weight_VD: Tensor) -> Tensor:
    logits_XV = h_XD @ weight_VD.T
    return logits_XV.to(torch.promote_types(logits_XV.dtype, torch.float32))


def _combine(logits_XV: Tensor, place_X: Tensor, together: Together) -> tuple[Tensor, Tensor]:
    """Over the whole vocabulary: the log of the sum of exponentials, and the logit of the target (0 if ignored)."""
    here_X = (place_X >= 0) & (place_X < logits_XV.shape[1])
    target_X = logits_XV.gather(1, place_X.masked_fill(~here_X, 0)[:, None])[:, 0] * here_X
    parts_P2X = together(torch.stack([logits_XV.logsumexp(1), target_X]))
    return parts_P2X[:, 0].logsumexp(0), parts_P2X[:, 1].sum(0)


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_XD, weight_VD, targets_X, first, together, ignore_index):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(h_XD.dtype, torch.float32)
        total = h_XD.new_zeros((), dtype=wide)
        dh_XD = torch.empty_like(h_XD)
        dw_VD = torch.zeros_like(weight_VD, dtype=wide)
        weight = weight_VD.to(h_XD.dtype)
        size = loss.chunk(len(weight_VD))
        for i in range(0, h_XD.shape[0], size):
            h, targets = h_XD[i : i + size], targets_X[i : i + size]
            logits_XV = _wide_logits(h, weight)
            scored_X, place_X = targets != ignore_index, targets - first
            normaliser_X, target_X = _combine(logits_XV, place_X, together)
            total += ((normaliser_X - target_X) * scored_X).sum()
            dlogits_XV = logits_XV.sub_(normaliser_X[:, None]).exp_()
            here_X = (place_X >= 0) & (place_X < len(weight))
            dlogits_XV.scatter_add_(1, place_X.masked_fill(~here_X, 0)[:, None], -here_X[:, None].to(wide))
            dlogits_XV = dlogits_XV.mul_(scored_X[:, None]).to(h.dtype)
            torch.mm(dlogits_XV, weight, out=dh_XD[i : i + size])
            dw_VD += dlogits_XV.T @ h
        ctx.save_for_backward(dh_XD, dw_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx, dtotal):  # type: ignore[no-untyped-def]
        dh_XD, dw_VD = ctx.saved_tensors
        return dh_XD * dtotal.to(dh_XD.dtype), dw_VD * dtotal.to(dw_VD.dtype), None, None, None, None
