"""The configurator's margins: a thin linear map, whose cost is reading its input."""

import torch
from torch import Tensor

from megaboat.kernels.fan import SideGradients


def margins(
    h_XD: Tensor, center_D: Tensor, weight_MD: Tensor, bias_M: Tensor, side: SideGradients | None = None
) -> Tensor:
    """(h - center) . weight_m + bias_m in fp32 (fp64 for fp64 parameters): (X, M), whatever the dtype of h.

    `side`, on GPUs: where the gradient of h is left.
    """
    if h_XD.is_cuda and weight_MD.dtype == torch.float32:
        from megaboat.kernels.margin_triton import margins_triton

        return margins_triton(h_XD, center_D, weight_MD, bias_M, side)
    return torch.nn.functional.linear(h_XD.to(center_D.dtype) - center_D, weight_MD, bias_M)
