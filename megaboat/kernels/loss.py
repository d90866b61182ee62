"""Cross-entropy of a linear head without the V x tokens logits in memory."""

import torch
from torch import Tensor

TOKENS, VOCABULARY = 8192, 50_000  # whose logits may exist at one time: in bf16 they are 0.8 GB


def chunk(vocabulary: int) -> int:
    """Tokens whose logits exist at one time: more of them where each has few, for the sake of fewer launches."""
    return TOKENS << max(0, (VOCABULARY // vocabulary).bit_length() - 1)


def linear_cross_entropy(h_XD: Tensor, weight_VD: Tensor, targets_X: Tensor, ignore_index: int = -100) -> Tensor:
    """The sum of negative log-likelihoods in nats over tokens whose target is not `ignore_index`; fp32 scalar.

    Gradients are computed in the forward pass, chunk by chunk, and scaled in the backward pass.
    """
    return _LinearCrossEntropy.apply(h_XD, weight_VD, targets_X, ignore_index)


@torch.no_grad()
def token_nll(h_XD: Tensor, weight_VD: Tensor, targets_X: Tensor, ignore_index: int = -100) -> Tensor:
    """Negative log-likelihood of each token in nats, zero where ignored: (X,) fp32. For evaluation."""
    parts = []
    size = chunk(len(weight_VD))
    for h, targets in zip(h_XD.split(size), targets_X.split(size), strict=True):
        logits = _logits(h, weight_VD)
        parts.append(torch.nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none"))
    return torch.cat(parts)


def _logits(h_XD: Tensor, weight_VD: Tensor) -> Tensor:
    logits_XV = h_XD @ weight_VD.to(h_XD.dtype).T
    return logits_XV.float() if logits_XV.dtype == torch.bfloat16 else logits_XV


def _nll_and_gradient(logits_XV: Tensor, targets_X: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods (X,) and the gradient of their sum; the logits may be overwritten by it."""
    if logits_XV.is_cuda and logits_XV.dtype != torch.float64:
        from megaboat.kernels.loss_triton import cross_entropy_triton

        return cross_entropy_triton(logits_XV, targets_X, ignore_index), logits_XV
    wide = torch.promote_types(logits_XV.dtype, torch.float32)
    scored = targets_X != ignore_index
    logprob_XV = torch.log_softmax(logits_XV, dim=-1, dtype=wide)
    picked_X1 = targets_X.masked_fill(~scored, 0)[:, None]
    nll_X = -(logprob_XV.gather(1, picked_X1)[:, 0] * scored)
    dlogits_XV = logprob_XV.exp_()
    dlogits_XV.scatter_add_(1, picked_X1, -torch.ones_like(picked_X1, dtype=wide))
    return nll_X, dlogits_XV.mul_(scored[:, None]).to(logits_XV.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_XD, weight_VD, targets_X, ignore_index):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(h_XD.dtype, torch.float32)
        total = h_XD.new_zeros((), dtype=wide)
        dh_XD = torch.empty_like(h_XD)
        dw_VD = torch.zeros_like(weight_VD, dtype=wide)  # a sum over chunks in bf16 would lose the later ones
        weight = weight_VD.to(h_XD.dtype)
        size = chunk(len(weight_VD))
        for i in range(0, h_XD.shape[0], size):
            h, targets = h_XD[i : i + size], targets_X[i : i + size]
            nll, dlogits = _nll_and_gradient(h @ weight.T, targets, ignore_index)
            total += nll.sum()
            torch.mm(dlogits, weight, out=dh_XD[i : i + size])
            dw_VD += dlogits.T @ h
        ctx.save_for_backward(dh_XD, dw_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx, dtotal):  # type: ignore[no-untyped-def]
        dh_XD, dw_VD = ctx.saved_tensors
        # In fp32, chunk by chunk: 1 / targets in bf16 would be up to 0.4 % off, and with it every gradient below.
        scaled_XD = torch.empty_like(dh_XD)
        size = chunk(len(dw_VD))
        for scaled, dh in zip(scaled_XD.split(size), dh_XD.split(size), strict=True):
            scaled.copy_(dh.to(dtotal.dtype) * dtotal)
        return scaled_XD, dw_VD * dtotal.to(dw_VD.dtype), None, None
