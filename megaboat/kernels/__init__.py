"""Functions on tensors. `reference` is the truth; the names here choose the fastest form that the device has."""

from megaboat.kernels.attention import windowed_attention
from megaboat.kernels.ema import ema
from megaboat.kernels.loss import linear_cross_entropy, token_nll
from megaboat.kernels.rows import ActiveRows, PendingRows, begin_plan, compress, extract, plan_rows

__all__ = [
    "ActiveRows",
    "PendingRows",
    "begin_plan",
    "compress",
    "ema",
    "extract",
    "linear_cross_entropy",
    "plan_rows",
    "token_nll",
    "windowed_attention",
]
