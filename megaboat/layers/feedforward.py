"""SwiGLU feed-forward (Shazeer 2020): down( SiLU(gate x) * up x )."""

from torch import Tensor, nn

from megaboat import kernels
from megaboat.layers.linear import Linear
from megaboat.layers.precision import to_compute_dtype


class FeedForward(nn.Module):
    """(..., D) -> (..., D) through `hidden` channels."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(width, hidden, bias=False)
        self.up = Linear(width, hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(kernels.swiglu(to_compute_dtype(x), self.gate.weight, self.up.weight))
