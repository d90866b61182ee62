"""MD-EMA's coefficients from its parameters (MEGA, section 3.2): fp32 in and out."""

import torch
from torch import Tensor


def damped_coefficients(
    smoothing_DN: Tensor, damping_DN: Tensor, expansion_DN: Tensor, projection_DN: Tensor
) -> tuple[Tensor, Tensor]:
    """decay = 1 - p sigmoid(damping) and weight = N^(-1/2) p expansion projection, with p = sigmoid(smoothing): (D, N).

    Small tensors: on a GPU the cost of plain torch is some twenty launches in each layer.
    """
    if smoothing_DN.is_cuda and smoothing_DN.dtype == torch.float32:
        from megaboat.kernels.coefficients_triton import damped_coefficients_triton

        return damped_coefficients_triton(smoothing_DN, damping_DN, expansion_DN, projection_DN)
    p_DN = smoothing_DN.sigmoid()
    decay_DN = 1 - p_DN * damping_DN.sigmoid()
    return decay_DN, p_DN * expansion_DN * projection_DN * smoothing_DN.shape[1] ** -0.5
