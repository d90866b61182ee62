"""Gather rows, zeros where there is none: one read and one write, where torch would pass twice over the output."""

import triton
import triton.language as tl
from torch import Tensor

from megaboat.kernels.sizes import cdiv, next_power_of_2


def gather_rows_triton(x_XD: Tensor, index_R: Tensor) -> Tensor:
    """out[i] = x[index[i]], or zeros where index[i] is -1: (X, D), int64 (R,) -> (R, D). Not differentiable."""
    x_XD = x_XD.contiguous()
    R, D = index_R.shape[0], x_XD.shape[1]
    out_RD = x_XD.new_empty(R, D)
    if R > 0:
        BD = min(next_power_of_2(D), 4096)
        gather_rows_kernel[(R, cdiv(D, BD))](x_XD, index_R, out_RD, D, BD)
    return out_RD


@triton.jit
def gather_rows_kernel(x, index, out, D, BD: tl.constexpr):  # type: ignore[no-untyped-def]
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    source = tl.load(index + i_r)
    # Loads of a row that does not exist are masked, not clamped: half of the tokens or more may have none.
    b_x = tl.load(x + source * D + o_d, mask=o_d < tl.where(source >= 0, D, 0), other=0.0)
    tl.store(out + i_r * D + o_d, b_x, mask=o_d < D)
