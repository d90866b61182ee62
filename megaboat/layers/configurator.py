"""The latent configurator: which modules a token activates, and with what confidence. SeqBoat, section 3."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megaboat import kernels


class Routing(NamedTuple):
    """The decisions of one layer over X tokens and M modules."""

    active_XM: Tensor
    """bool: the module runs on the token. No gradient."""
    confidence_XM: Tensor
    """fp32: probability of the decision where active, in (1/2, 1) at threshold 0; 0 elsewhere. Carries the only
    gradient. 1 where active for the arms `always` and, out of training, `gumbel`."""
    margin_XM: Tensor
    """fp32: logit of activating minus logit of skipping, before the temperature."""
    log_temperature_M: Tensor
    """fp32: of each module. No gradient."""
    overflow_M: Tensor | None = None
    """Capacity mode: int64, tokens that are inactive here because no row was left for them."""


class PreciseLinear(nn.Linear):
    """Two logits a module, in fp32 in memory and in communication: mixed precision goes by class name."""

    def forward(  # type: ignore[override]
        self, h_XD: Tensor, center_D: Tensor, side: kernels.SideGradients | None = None
    ) -> Tensor:
        """(X, M): each module's second logit minus its first, for the input less `center_D`."""
        return kernels.margins(h_XD, center_D, self.weight, self.bias, side)


class Configurator(nn.Module):
    """Two logits a module from a linear map, a hard argmax without gradient, a tempered softmax for the confidence.

        m = 1[u_1 - u_0 > threshold]     P = softmax(u / temperature)     c = m P_1     (a tie skips)

    That is the arm `tempered`. The others are what the paper compares it with (its appendix, and the public code):

    gumbel  a sample of the relaxed decision in training: u_1 - u_0 plus logistic noise, at a temperature that falls
            from 2 to 1/2 in the first half of the run; without noise and with c = 1 in evaluation
    always  every token, c = 1: the layer without a configurator
    never   no token: the layer without its modules

    The threshold is 0 as published; a budget moves it (`parallel.balance.control`): that changes what is selected,
    no confidence. Parameters in fp32. `center_D` is subtracted from the input: zero as published, the mean input of a
    batch after `calibrate`, so that weight updates do not shift all tokens of a layer at once.
    """

    center_D: Tensor
    threshold_M: Tensor

    def __init__(self, width: int, modules: int, arm: str = "tempered") -> None:
        super().__init__()
        self.arm = arm
        self.progress = 0.0
        """Share of the run that is done, for the arm `gumbel`; the trainer says it."""
        self.logits = PreciseLinear(width, 2 * modules)
        self.log_temperature = nn.Parameter(torch.empty(modules))
        self.register_buffer("center_D", torch.zeros(width))
        self.register_buffer("threshold_M", torch.zeros(modules))
        self.agree: Callable[[Tensor], Tensor] | None = None
        """Makes one decision of the decisions that several holders of the layer took on the same tokens."""

    def forward(
        self, h_XD: Tensor, active_XM: Tensor | None = None, side: kernels.SideGradients | None = None
    ) -> Routing:
        """Decide for each token, or keep the decisions `active_XM` (a recomputation must not flip them).

        `side`: where the gradient of h may be left.
        """
        with torch.autocast(h_XD.device.type, enabled=False):
            margin_XM = self.logits(h_XD, self.center_D, side)
            log_temperature_M: Tensor = self.log_temperature
            if self.arm == "gumbel" and self.training:
                margin_XM = margin_XM + logistic_noise(margin_XM)
                log_temperature_M = torch.full_like(log_temperature_M, math.log(gumbel_temperature(self.progress)))
            if self.arm == "never":
                margin_XM = -margin_XM.abs()  # or figures would call its tokens turned away by a capacity
            if active_XM is None:
                active_XM = self._decide(margin_XM.detach())
                active_XM = active_XM if self.agree is None else self.agree(active_XM)
            confidence_XM = kernels.confidences(margin_XM, log_temperature_M, active_XM)
            if self.arm == "always" or (self.arm == "gumbel" and not self.training):
                confidence_XM = active_XM + 0 * confidence_XM  # the logits stay in the graph: ranks must agree on it
        return Routing(active_XM, confidence_XM, margin_XM, log_temperature_M.detach())

    def _decide(self, margin_XM: Tensor) -> Tensor:
        if self.arm == "always":
            return torch.ones_like(margin_XM, dtype=torch.bool)
        if self.arm == "never":
            return torch.zeros_like(margin_XM, dtype=torch.bool)
        return margin_XM > self.threshold_M

    @torch.no_grad()
    def calibrate(self, h_XD: Tensor) -> None:
        """Center the input on `h_XD` and set the bias so that half of its tokens activate each module."""
        self.center_D.copy_(h_XD.float().mean(0))
        margin_XM = self.forward(h_XD).margin_XM
        self.logits.bias.view(-1, 2)[:, 1] -= margin_XM.quantile(0.5, dim=0)


def initial_log_temperature(width: int, scale: float) -> float:
    """theta = log(scale sqrt(D)): about the spread of the logits, so that confidences start near 1/2."""
    return math.log(scale * math.sqrt(width))


def logistic_noise(like: Tensor) -> Tensor:
    """The difference of two standard Gumbel variables, one for each number of `like`."""
    u = torch.rand_like(like).clamp_(1e-6, 1 - 1e-6)
    return u.log() - (-u).log1p()


def gumbel_temperature(progress: float) -> float:
    """From 2 to 1/2, exponentially, over the first half of the run."""
    return 2.0 * 0.25 ** min(1.0, 2 * progress)
