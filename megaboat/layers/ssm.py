"""State-space layers behind the interface of the moving average, to be compared with it: S4D and S5."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaboat import kernels
from megaboat.kernels.reference import ema_recurrence
from megaboat.layers.ema import DampedEMA

BLOCK = 64  # states of S5 that start from one HiPPO matrix, as most


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
        """decay and weight (D, N / 2), complex."""
        decay_DP, held_DP = _held(self.log_step.exp()[:, None], self.log_rate.exp(), self.frequency)
        return decay_DP, 2 * _complex(self.readout) * held_DP

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


class S5(DampedEMA):
    """One state that all channels share, of P = D / 2 pairs of complex poles: S5 (Smith et al. 2023, arXiv 2208.04933).

        h' = (-rate + i frequency) h + B x    y_t = SiLU( 2 Re C h_t + skip x_t )

    Held between tokens (zero-order hold) with a step for each pole. Poles, B and C start from HiPPO-N in blocks. The
    state is D numbers, real and imaginary parts side by side (I = 2 P), whatever `order` is. Two D x D products a token
    in fp32 and `diagonal_scan`, in plain torch.
    """

    def __init__(self, width: int, order: int) -> None:
        super().__init__(width, order)
        for name in ("smoothing", "damping", "expansion", "projection"):
            delattr(self, name)
        self.block = max(states for states in range(2, BLOCK + 1, 2) if width % states == 0)
        self.log_rate = nn.Parameter(torch.empty(width // 2))
        self.frequency = nn.Parameter(torch.empty(width // 2))
        self.log_step = nn.Parameter(torch.empty(width // 2))
        self.into = nn.Parameter(torch.empty(width // 2, width, 2))
        self.readout = nn.Parameter(torch.empty(width, width // 2, 2))

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """decay_P, and the maps into and out of the state's real and imaginary parts: (D, I) and (I, D)."""
        decay_P, held_P = _held(self.log_step.exp(), self.log_rate.exp(), self.frequency)
        into_PD = held_P[:, None] * _complex(self.into)
        out_DP = 2 * _complex(self.readout).conj().resolve_conj()
        return decay_P, torch.view_as_real(into_PD).transpose(0, 1).flatten(1), torch.view_as_real(out_DP).flatten(1).T

    def forward(self, x_BTD: Tensor, first_BT: Tensor, state_BI: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns y_BTD and the state after each row's last token."""
        y_BTD, h_BTI = self._run(x_BTD, self.skip, first_BT, state_BI)
        return kernels.silu(y_BTD), h_BTI[:, -1].clone()  # of its own, or it would hold the states of all tokens

    def filtered(self, x_BTD: Tensor, skip_D: Tensor, reach: int = 0) -> Tensor:
        """Of rows that are one document each, what SiLU is taken of, with another skip term; `reach` as in the base."""
        y_BTD, h_BTI = self._run(x_BTD, skip_D)
        if not 0 < reach < x_BTD.shape[1]:
            return y_BTD
        decay_P, _, out_ID = self.matrices()
        old_BTP = decay_P**reach * _as_complex(h_BTI[:, :-reach])
        return y_BTD - F.pad(torch.view_as_real(old_BTP).flatten(-2) @ out_ID, (0, 0, reach, 0)).to(y_BTD.dtype)

    def new_state(self, rows: int) -> Tensor:
        """The state before any token; rows come first."""
        return self.skip.new_zeros(rows, len(self.skip))

    def step(self, x_BD: Tensor, state_BI: Tensor) -> tuple[Tensor, Tensor]:
        """One token of each row: y_BD and the next state."""
        y_B1D, h_B1I = self._run(x_BD[:, None], self.skip, state_BI=state_BI)
        return kernels.silu(y_B1D[:, 0]), h_B1I[:, 0]

    def _run(
        self, x_BTD: Tensor, skip_D: Tensor, first_BT: Tensor | None = None, state_BI: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What SiLU is taken of, in the dtype of x, and the state after each token."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            decay_P, into_DI, out_ID = self.matrices()
            precise_BTD = x_BTD.to(into_DI.dtype)
            state_BP = None if state_BI is None else _as_complex(state_BI)
            h_BTP = kernels.diagonal_scan(_as_complex(precise_BTD @ into_DI), decay_P, first_BT, state_BP)
            h_BTI = torch.view_as_real(h_BTP).flatten(-2)
            return (h_BTI @ out_ID + skip_D * precise_BTD).to(x_BTD.dtype), h_BTI


def hippo_normal(states: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues and orthonormal eigenvectors of HiPPO-N, one of each conjugate pair: (S / 2,) and (S, S / 2).

    HiPPO-N is the normal part of HiPPO-LegS, -1/2 on the diagonal and sqrt(n + 1/2) sqrt(k + 1/2) beside it, negative
    below (S5, appendix B.1.1). Complex fp64. Each vector's first component is made positive, since a phase is free.
    """
    root_S = torch.arange(states, dtype=torch.float64).add(0.5).sqrt()
    upper_SS = torch.outer(root_S, root_S).triu(1)
    turn_S, vectors_SS = torch.linalg.eigh(-1j * (upper_SS - upper_SS.T))  # Hermitian: ascending, -w beside w
    kept_SP = vectors_SS[:, states // 2 :]
    kept_SP = kept_SP * kept_SP[0].abs() / kept_SP[0]
    return torch.complex(torch.full_like(turn_S, -0.5), turn_S)[states // 2 :], kept_SP


def _held(step: Tensor, rate: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """Of the pole -rate + i frequency with x held over a step: decay, and what is added for an x of one.

    decay - 1 without the digits that the difference would lose.
    """
    shrunk, angle = torch.exp(-step * rate), step * frequency
    gained = torch.expm1(-step * rate) * angle.cos() - 2 * (angle / 2).sin().square()
    turned = shrunk * angle.sin()
    held = torch.complex(gained, turned) / torch.complex(-rate, frequency)
    return torch.complex(shrunk * angle.cos(), turned), held


def _complex(pairs: Tensor) -> Tensor:
    """A copy: a parameter may lie at an odd place of a flat buffer (ZeRO), where no complex view begins."""
    return torch.complex(*pairs.unbind(-1))


def _as_complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)).contiguous())


SSMS = {"ema": DampedEMA, "s4d-real": S4DReal, "s4d-lin": S4DLin, "s5": S5}
