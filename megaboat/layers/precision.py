"""Mixed precision: parameters stay fp32, autocast decides in what dtype activations travel."""

import torch
from torch import Tensor


def to_compute_dtype(x: Tensor) -> Tensor:
    """`x` in autocast's dtype, which is bf16, where autocast is on, unchanged where it is off."""
    if x.dtype == torch.bfloat16:
        return x
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
