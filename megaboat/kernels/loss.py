"""Cross-entropy of a linear head without the V x tokens logits in memory."""

import torch
from torch import Tensor

CHUNK = 4096  # tokens whose logits exist at one time: 4096 x 50k fp32 logits are 0.8 GB


def linear_cross_entropy(
    h_XD: Tensor, weight_VD: Tensor, targets_X: Tensor, ignore_index: int = -100
) -> Tensor:
    """The sum of negative log-likelihoods in nats over tokens whose target is not `ignore_index`; fp32 scalar.

    Gradients are computed in the forward pass, chunk by chunk, and scaled in the backward pass.
    """
    return _LinearCrossEntropy.apply(h_XD, weight_VD, targets_X, ignore_index)


@torch.no_grad()
def token_nll(h_XD: Tensor, weight_VD: Tensor, targets_X: Tensor, ignore_index: int = -100) -> Tensor:
    """Negative log-likelihood of each token in nats, zero where ignored: (X,) fp32. For evaluation."""
    parts = []
    for h, targets in zip(h_XD.split(CHUNK), targets_X.split(CHUNK), strict=True):
        logits = _logits(h, weight_VD)
        parts.append(
            torch.nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
        )
    return torch.cat(parts)


def _logits(h_XD: Tensor, weight_VD: Tensor) -> Tensor:
    logits_XV = h_XD @ weight_VD.to(h_XD.dtype).T
    return logits_XV.float() if logits_XV.dtype == torch.bfloat16 else logits_XV


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_XD, weight_VD, targets_X, ignore_index):  # type: ignore[no-untyped-def]
        total = h_XD.new_zeros((), dtype=torch.promote_types(h_XD.dtype, torch.float32))
        dh_XD = torch.empty_like(h_XD)
        dw_VD = torch.zeros_like(weight_VD)
        weight = weight_VD.to(h_XD.dtype)
        for i in range(0, h_XD.shape[0], CHUNK):
            h, targets = h_XD[i : i + CHUNK], targets_X[i : i + CHUNK]
            scored = targets != ignore_index
            logprob = torch.log_softmax(_logits(h, weight), dim=-1)
            picked = targets.masked_fill(~scored, 0)[:, None]
            total -= (logprob.gather(1, picked)[:, 0] * scored).sum()
            dlogits = logprob.exp_()
            dlogits.scatter_add_(1, picked, -torch.ones_like(picked, dtype=dlogits.dtype))
            dlogits = dlogits.mul_(scored[:, None]).to(h.dtype)
            torch.mm(dlogits, weight, out=dh_XD[i : i + CHUNK])
            dw_VD += dlogits.T @ h
        ctx.save_for_backward(dh_XD, dw_VD)
        return total

    @staticmethod
    def backward(ctx, dtotal):  # type: ignore[no-untyped-def]
        dh_XD, dw_VD = ctx.saved_tensors
        return dh_XD * dtotal.to(dh_XD.dtype), dw_VD * dtotal.to(dw_VD.dtype), None, None
