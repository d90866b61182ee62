"""Where a layer's paths meet: what every token has, and what a module adds to its active tokens."""

import torch
from torch import Tensor

from megaboat.kernels.rows import ActiveRows, compress, extract


def join_rows(
    base_XD: Tensor, y_RD: Tensor, confidence_X: Tensor, rows: ActiveRows, residual_XD: Tensor | None = None
) -> Tensor:
    """base_t + confidence_t y_row(t) where t is active, base_t elsewhere: (X, D), in the dtype of `base_XD`.

    With a residual, SiLU(residual + that), in the residual's dtype.
    """
    if base_XD.is_cuda and base_XD.dtype != torch.float64:
        from megaboat.kernels.join_triton import join_rows_triton

        return join_rows_triton(base_XD, y_RD, confidence_X, rows, residual_XD)
    confidence_R1 = compress(confidence_X[:, None], rows)
    out_XD = base_XD + extract(y_RD * confidence_R1.to(y_RD.dtype), rows).to(base_XD.dtype)
    if residual_XD is None:
        return out_XD
    return torch.nn.functional.silu(out_XD.to(residual_XD.dtype) + residual_XD)
