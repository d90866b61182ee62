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
    gradient."""
    margin_XM: Tensor
    """fp32: logit of activating minus logit of skipping, before the temperature."""
    temperature_M: Tensor
    """fp32: of each module. No gradient."""


class PreciseLinear(nn.Linear):
    """Two logits a module, in fp32 in memory and in communication: mixed precision goes by class name."""

    def forward(self, h_XD: Tensor, center_D: Tensor) -> Tensor:  # type: ignore[override]
        """(X, M): each module's second logit minus its first, for the input less `center_D`."""
        weight_M2D, bias_M2 = self.weight.unflatten(0, (-1, 2)), self.bias.unflatten(0, (-1, 2))
        return kernels.margins(h_XD, center_D, weight_M2D[:, 1] - weight_M2D[:, 0], bias_M2[:, 1] - bias_M2[:, 0])


class Configurator(nn.Module):
    """Two logits a module from a linear map, a hard argmax without gradient, a tempered softmax for the confidence.

        m = 1[u_1 - u_0 > threshold]     P = softmax(u / temperature)     c = m P_1     (a tie skips)

    The threshold is 0 as published; a budget moves it (`parallel.balance.control`): that changes what is selected,
    no confidence. Parameters in fp32. `center_D` is subtracted from the input: zero as published, the mean input of a
    batch after `calibrate`, so that weight updates do not shift all tokens of a layer at once.
    """

    center_D: Tensor
    threshold_M: Tensor

    def __init__(self, width: int, modules: int) -> None:
        super().__init__()
        self.logits = PreciseLinear(width, 2 * modules)
        self.log_temperature = nn.Parameter(torch.empty(modules))
        self.register_buffer("center_D", torch.zeros(width))
        self.register_buffer("threshold_M", torch.zeros(modules))
        self.agree: Callable[[Tensor], Tensor] | None = None
        """Makes one decision of the decisions that several holders of the layer took on the same tokens."""

    def forward(self, h_XD: Tensor, active_XM: Tensor | None = None) -> Routing:
        """Decide for each token, or keep the decisions `active_XM` (a recomputation must not flip them)."""
        with torch.autocast(h_XD.device.type, enabled=False):
            margin_XM = self.logits(h_XD, self.center_D)
            if active_XM is None:
                active_XM = margin_XM.detach() > self.threshold_M
                active_XM = active_XM if self.agree is None else self.agree(active_XM)
            temperature_M = self.log_temperature.exp()
            confidence_XM = torch.sigmoid(margin_XM / temperature_M) * active_XM
        return Routing(active_XM, confidence_XM, margin_XM, temperature_M.detach())

    @torch.no_grad()
    def calibrate(self, h_XD: Tensor) -> None:
        """Center the input on `h_XD` and set the bias so that half of its tokens activate each module."""
        self.center_D.copy_(h_XD.float().mean(0))
        margin_XM = self.forward(h_XD).margin_XM
        self.logits.bias.view(-1, 2)[:, 1] -= margin_XM.quantile(0.5, dim=0)


def initial_log_temperature(width: int, scale: float) -> float:
    """theta = log(scale sqrt(D)): about the spread of the logits, so that confidences start near 1/2."""
    return math.log(scale * math.sqrt(width))
