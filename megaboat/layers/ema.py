"""The linear state-space layer that sees every token: MD-EMA (MEGA, section 3.2), and S4D behind its interface."""

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

    def step(self, x_BD: Tensor, state_BDN: Tensor) -> tuple[Tensor, Tensor]:
        """One token of each row: y_BD and the next state."""
        with torch.autocast(x_BD.device.type, enabled=False):
            x_B1D = x_BD[:, None].to(state_BDN.dtype)
            y_B1D, state_BDN = ema_recurrence(x_B1D, *self.coefficients(), self.skip, state_BDN=state_BDN)
        return nn.functional.silu(y_B1D[:, 0].to(x_BD.dtype)), state_BDN


class S4DReal(DampedEMA):
    """A diagonal state-space model in continuous time, held between tokens (zero-order hold), with real poles.

        h' = -rate h + x    decay = exp(-step rate)    y_t = SiLU( sum_k readout_k h_t,k + skip x_t )

    S4D-Real of Gu et al. 2022 (arXiv 2206.11893): rates start at 1 .. N, the steps of channels log-uniform between
    0.001 and 0.1, so that some channels remember a thousand tokens where MD-EMA starts with about six.
    """

    def __init__(self, width: int, order: int) -> None:
        super().__init__(width, order)
        for name in ("smoothing", "damping", "expansion", "projection"):
            delattr(self, name)
        self.log_rate = nn.Parameter(torch.empty(width, order))
        self.log_step = nn.Parameter(torch.empty(width))
        self.readout = nn.Parameter(torch.empty(width, order))

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """The kernels carry s with h = s (1 - decay) / rate."""
        rate_DN = self.log_rate.exp()
        spent_DN = -torch.expm1(-self.log_step.exp()[:, None] * rate_DN)
        return 1 - spent_DN, self.readout * spent_DN / rate_DN


class S4DLin(DampedEMA):
    """A diagonal state-space model with N / 2 pairs of complex poles, which remember phases: S4D-Lin (Gu et al. 2022).

        h' = (-rate + i frequency) h + x    y_t = SiLU( 2 Re sum_k readout_k h_t,k + skip x_t )

    Poles start at -1/2 + i pi n with n = 0 .. N/2 - 1, steps as in S4D-Real. The state is as large as that of N real
    ones: real and imaginary part of each, side by side.
    """

    def __init__(self, width: int, order: int) -> None:
        super().__init__(width, order)
        for name in ("smoothing", "damping", "expansion", "projection"):
            delattr(self, name)
        self.log_rate = nn.Parameter(torch.empty(width, order // 2))
        self.frequency = nn.Parameter(torch.empty(width, order // 2))
        self.log_step = nn.Parameter(torch.empty(width))
        self.readout = nn.Parameter(torch.empty(width, order // 2, 2))

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """decay and weight (D, N / 2), complex; decay - 1 without the digits that the difference would lose."""
        step_D1, rate_DP = self.log_step.exp()[:, None], self.log_rate.exp()
        shrunk_DP, angle_DP = torch.exp(-step_D1 * rate_DP), step_D1 * self.frequency
        gained_DP = torch.expm1(-step_D1 * rate_DP) * angle_DP.cos() - 2 * (angle_DP / 2).sin().square()
        turned_DP = shrunk_DP * angle_DP.sin()
        held_DP = torch.complex(gained_DP, turned_DP) / torch.complex(-rate_DP, self.frequency)
        decay_DP = torch.complex(shrunk_DP * angle_DP.cos(), turned_DP)
        return decay_DP, 2 * torch.view_as_complex(self.readout) * held_DP

    def forward(self, x_BTD: Tensor, first_BT: Tensor, state_BDN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns y_BTD and the state after each row's last token."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            state_BDP = None if state_BDN is None else _as_complex(state_BDN)
            y_BTD, state_BDP = kernels.ema(x_BTD, *self.coefficients(), self.skip, first_BT, state_BDP, silu=True)
        return y_BTD, torch.view_as_real(state_BDP).flatten(-2)

    def step(self, x_BD: Tensor, state_BDN: Tensor) -> tuple[Tensor, Tensor]:
        """One token of each row: y_BD and the next state."""
        with torch.autocast(x_BD.device.type, enabled=False):
            x_B1D, state_BDP = x_BD[:, None].to(state_BDN.dtype), _as_complex(state_BDN)
            y_B1D, state_BDP = ema_recurrence(x_B1D, *self.coefficients(), self.skip, state_BDN=state_BDP)
        return nn.functional.silu(y_B1D[:, 0].to(x_BD.dtype)), torch.view_as_real(state_BDP).flatten(-2)


def _as_complex(state_BDN: Tensor) -> Tensor:
    return torch.view_as_complex(state_BDN.unflatten(-1, (-1, 2)).contiguous())


SSMS = {"ema": DampedEMA, "s4d-real": S4DReal, "s4d-lin": S4DLin}
