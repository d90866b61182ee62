"""Functions on tensors. `reference` is the truth; the names here choose the fastest form that the device has."""

from megaboat.kernels.attention import windowed_attention
from megaboat.kernels.coefficients import damped_coefficients
from megaboat.kernels.confidence import confidences
from megaboat.kernels.ema import ema
from megaboat.kernels.fan import SideGradients, fan_out, side_gradients
from megaboat.kernels.gate import silu, silu_gate, silu_maps, swiglu
from megaboat.kernels.join import join_rows
from megaboat.kernels.linear import NarrowCopies, linear
from megaboat.kernels.loss import linear_cross_entropy, token_nll
from megaboat.kernels.loss_sharded import sharded_cross_entropy, sharded_token_nll
from megaboat.kernels.margin import margins
from megaboat.kernels.norm import branch_norm, layer_norm
from megaboat.kernels.recompute import elementwise as recompute_elementwise
from megaboat.kernels.rotary import rotary_heads, rotary_pair
from megaboat.kernels.rows import ActiveRows, PendingRows, begin_plan, compress, extract, few_sizes, plan_rows, room
from megaboat.kernels.scan import diagonal_scan

__all__ = [
    "ActiveRows",
    "NarrowCopies",
    "PendingRows",
    "SideGradients",
    "begin_plan",
    "branch_norm",
    "compress",
    "confidences",
    "damped_coefficients",
    "diagonal_scan",
    "ema",
    "extract",
    "fan_out",
    "few_sizes",
    "join_rows",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "margins",
    "plan_rows",
    "recompute_elementwise",
    "room",
    "rotary_heads",
    "rotary_pair",
    "sharded_cross_entropy",
    "sharded_token_nll",
    "side_gradients",
    "silu",
    "silu_gate",
    "silu_maps",
    "swiglu",
    "token_nll",
    "windowed_attention",
]
