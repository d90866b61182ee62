"""The configurator's confidence in an activation: a tempered sigmoid, zero where nothing is activated."""

import torch
from torch import Tensor


def confidences(margin_XM: Tensor, log_temperature_M: Tensor, active_XM: Tensor) -> Tensor:
    """sigmoid(margin / exp(log_temperature)) where active, 0 elsewhere: (X, M) in fp32 or fp64."""
    if margin_XM.is_cuda and margin_XM.dtype == torch.float32:
        from megaboat.kernels.confidence_triton import confidences_triton

        return confidences_triton(margin_XM, log_temperature_M, active_XM)
    return torch.sigmoid(margin_XM / log_temperature_M.exp()) * active_XM
