"""SwiGLU feed-forward (Shazeer 2020): down( SiLU(gate x) * up x )."""

from torch import Tensor, nn

from megaboat import kernels


class FeedForward(nn.Module):
    """(..., D) -> (..., D) through `hidden` channels."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(kernels.silu_gate(self.gate(x), self.up(x)))
