"""The configurator's margins: a thin linear map, whose cost is reading its input."""

import torch
from torch import Tensor

from megaboat.kernels.fan import SideGradients


def margins(
    h_XD: Tensor, center_D: Tensor, weight_KD: Tensor, bias_K: Tensor, side: SideGradients | None = None
) -> Tensor:
    """Of K = 2 M logits u = weight (h - center) + bias each second less the one before it: (X, M), in fp32 whatever the
    dtype of h (fp64 for fp64 parameters).

    `side`, on GPUs: where the gradient of h is left.
    """
    if h_XD.is_cuda and weight_KD.dtype == torch.float32:
        from megaboat.kernels.margin_triton import margins_triton

        return margins_triton(h_XD, center_D, weight_KD, bias_K, side)
    # Not by index, whose gradients are six launches where these are two.
    skip_MD, activate_MD = weight_KD.unflatten(0, (-1, 2)).unbind(1)
    skip_M, activate_M = bias_K.unflatten(0, (-1, 2)).unbind(1)
    h_XD = h_XD.to(center_D.dtype) - center_D
    return torch.nn.functional.linear(h_XD, activate_MD - skip_MD, activate_M - skip_M)
