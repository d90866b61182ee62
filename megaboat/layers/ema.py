"""The linear state-space layer that sees every token: MD-EMA (MEGA, section 3.2)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megaboat import kernels
from megaboat.kernels.reference import ema_recurrence


class DampedEMA(nn.Module):
    """SiLU of N damped averages a channel, projected back, plus a skip term.

        p = sigmoid(smoothing)    q = 1 - p sigmoid(damping)
        h_t = q h_{t-1} + p expansion x_t      y_t = SiLU( N^(-1/2) sum_k projection_k h_t,k + skip x_t )

    The kernels carry s = h / (p expansion), so that only q and the product p * expansion * projection enter.
    Parameters and state stay in fp32: a decay of 0.999 is 1.0 in bf16.
    """

    def __init__(self, width: int, order: int) -> None:
        super().__init__()
        self.order = order
        self.smoothing = nn.Parameter(torch.empty(width, order))
        self.damping = nn.Parameter(torch.empty(width, order))
        self.expansion = nn.Parameter(torch.empty(width, order))
        self.projection = nn.Parameter(torch.empty(width, order))
        self.skip = nn.Parameter(torch.empty(width))
        self.arrive: Callable[..., Tensor] | None = None
        """Where rows are pieces of longer ones: the state before each row, of `kernels.ema`'s first five arguments."""

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """decay (D, N) in (0, 1) and weight (D, N), as `kernels.ema` takes them."""
        return kernels.damped_coefficients(self.smoothing, self.damping, self.expansion, self.projection)

    def forward(self, x_BTD: Tensor, first_BT: Tensor, state_BDN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns y_BTD and the state after each row's last token."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            decay_DN, weight_DN = self.coefficients()
            if self.arrive is not None:
                state_BDN = self.arrive(x_BTD, decay_DN, weight_DN, self.skip, first_BT)
            return kernels.ema(x_BTD, decay_DN, weight_DN, self.skip, first_BT, state_BDN, silu=True)

    def filtered(self, x_BTD: Tensor, skip_D: Tensor, reach: int = 0) -> Tensor:
        """Of rows that are one document each, what SiLU is taken of, with another skip term.

        reach: so many tokens enter each sum, the token's own included; 0: all. What is older is summed up once more and
        taken off.
        """
        decay_DN, weight_DN = self.coefficients()
        y_BTD, _ = kernels.ema(x_BTD, decay_DN, weight_DN, skip_D)
        if not 0 < reach < x_BTD.shape[1]:
            return y_BTD
        old_BTD, _ = kernels.ema(x_BTD[:, :-reach], decay_DN, weight_DN * decay_DN**reach, torch.zeros_like(skip_D))
        return y_BTD - nn.functional.pad(old_BTD, (0, 0, reach, 0))

    def new_state(self, rows: int) -> Tensor:
        """The state before any token; rows come first."""
        return self.skip.new_zeros(rows, len(self.skip), self.order)

    def step(self, x_BD: Tensor, state_BDN: Tensor) -> tuple[Tensor, Tensor]:
        """One token of each row: y_BD and the next state."""
        with torch.autocast(x_BD.device.type, enabled=False):
            x_B1D = x_BD[:, None].to(state_BDN.dtype)
            y_B1D, state_BDN = ema_recurrence(x_B1D, *self.coefficients(), self.skip, state_BDN=state_BDN)
        return nn.functional.silu(y_B1D[:, 0].to(x_BD.dtype)), state_BDN
