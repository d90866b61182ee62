"""Hold each layer's activation where it is wanted: thresholds, losses, a memory valve, and a watch on dead layers.

All off by default: then nothing here touches the model.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megaboat.layers.configurator import Configurator, Routing
from megaboat.parallel.balance.config import BalanceConfig
from megaboat.parallel.balance.losses import ratio_loss, z_loss
from megaboat.parallel.balance.margins import quantile
from megaboat.parallel.balance.statistics import DEAD, SATURATED, LayerSums

# Of the threshold in a step. Margins drift by half of their spread in 50 steps at high learning rates: a mean over ten
# steps, which is steadier on still margins, runs up to 0.06 behind the budget then.
KEEP = 0.5
FOLLOW = 0.2  # of each gap goes into the trend: margins that all grow would else leave the threshold behind
PATIENCE = 100  # steps


class Control:
    """What the trainer asks before, within and after a step. One of a model; the same on all ranks."""

    def __init__(self, model: nn.Module, config: BalanceConfig) -> None:
        self.config = config
        self.configurators = [module for module in model.modules() if isinstance(module, Configurator)]
        self.fraction_LM: Tensor | None = None
        """Active share in the last global batch, for the ratio loss."""
        self.watch = Watch()
        self._borders: Tensor | None = None
        self._trend_LM = [[0.0] * len(configurator.threshold_M) for configurator in self.configurators]
        if config.capacity is not None:
            for configurator in self.configurators:
                configurator.register_forward_hook(self._turn_away)

    @property
    def moves_thresholds(self) -> bool:
        """Whether margins must be counted in every step."""
        return self.config.budget is not None or self.config.floor > 0 or self.config.ceil < 1

    def thresholds(self) -> Tensor:
        """(L, M)."""
        return torch.stack([configurator.threshold_M for configurator in self.configurators])

    def begin_step(self, progress: float) -> None:
        """Before a step, with the share of the run that is done: some configurators are annealed."""
        for configurator in self.configurators:
            configurator.progress = progress

    def begin(self, cu_seqlens: Tensor) -> None:
        """Before the forward pass of a micro-batch with these documents."""
        self._borders = cu_seqlens

    def add_losses(self, loss: Tensor, routings: list[Routing], scale: float) -> Tensor:
        """`loss` and the weighted losses of a micro-batch: summed over its tokens times `scale`, mean over layers."""
        if not routings or not (self.config.ratio_loss or self.config.z_loss):
            return loss  # a dense model takes no decisions
        margin_LXM = torch.stack([routing.margin_XM for routing in routings])
        temperature_L1M = torch.stack([routing.log_temperature_M for routing in routings])[:, None].exp()
        share = scale / temperature_L1M.numel()
        if self.config.ratio_loss:
            target = self.config.ratio_target
            fraction_L1M = torch.full_like(temperature_L1M, target)
            if self.fraction_LM is not None:
                # Else the host would wait here for the forward pass.
                fraction_L1M = self.fraction_LM[:, None].to(temperature_L1M, non_blocking=True)
            loss = (
                loss
                + self.config.ratio_loss * share * ratio_loss(margin_LXM, temperature_L1M, fraction_L1M, target).sum()
            )
        if self.config.z_loss:
            loss = loss + self.config.z_loss * share * z_loss(margin_LXM, temperature_L1M).sum()
        return loss

    def end(self, ratio_LM: np.ndarray, sums: LayerSums | None) -> list[str]:
        """After a step, with what all ranks did together. Returns what a person should hear."""
        self.fraction_LM = torch.from_numpy(ratio_LM)
        if self.moves_thresholds and sums is not None:
            for layer, configurator in enumerate(self.configurators):
                self._move(layer, configurator.threshold_M, sums.margins_LMK[layer], sums.threshold_LM[layer])
        return self.watch.update(ratio_LM)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the thresholds, which are buffers of the model."""
        fraction = self.fraction_LM.tolist() if self.fraction_LM is not None else None
        return {
            "fraction_LM": fraction,
            "trend_LM": self._trend_LM,
            "idle_LM": self.watch.idle_LM,
            "full_LM": self.watch.full_LM,
        }

    def load(self, state: dict[str, Any]) -> None:
        fraction = state["fraction_LM"]
        self.fraction_LM = torch.tensor(fraction, dtype=torch.float64) if fraction is not None else None
        self._trend_LM = state.get("trend_LM", self._trend_LM)
        self.watch.idle_LM, self.watch.full_LM = state["idle_LM"], state["full_LM"]

    @torch.no_grad()
    def _move(self, layer: int, threshold_M: Tensor, margins_MK: np.ndarray, counted_from_M: np.ndarray) -> None:
        for m, margins_K in enumerate(margins_MK):
            zero = float(counted_from_M[m])
            if self.config.budget is not None:
                gap = zero + quantile(margins_K, self.config.budget) - float(threshold_M[m])
                trend_M = self._trend_LM[layer]
                moved = float(threshold_M[m]) + (1 - KEEP) * gap + trend_M[m]
                trend_M[m] += FOLLOW * gap
            else:
                low, high = (zero + quantile(margins_K, share) for share in (self.config.ceil, self.config.floor))
                moved = min(max(0.0, low), high)
            threshold_M[m] = moved

    def _turn_away(self, module: nn.Module, inputs: Any, routing: Routing) -> Routing:
        """The routing without the later active tokens of each document that has too many. Twice is as once."""
        if not module.training:
            return routing
        assert self._borders is not None, "`begin` comes first"
        assert self.config.capacity is not None
        kept_XM = within_capacity(routing.active_XM, self._borders, self.config.capacity)
        return routing._replace(active_XM=kept_XM, confidence_XM=routing.confidence_XM * kept_XM)


def within_capacity(active_XM: Tensor, cu_seqlens: Tensor, share: float) -> Tensor:
    """The first active tokens of each document, up to its length times `share`, rounded up.

    A document is left alone by its neighbours, and a token by those after it.
    """
    borders = cu_seqlens.long()
    lengths_S = borders.diff()
    before_XM = torch.nn.functional.pad(active_XM.long().cumsum(0), (0, 0, 1, 0))
    document_X = torch.repeat_interleave(
        torch.arange(len(lengths_S), device=borders.device), lengths_S, output_size=len(active_XM)
    )
    count_XM = before_XM[1:] - before_XM[borders[:-1]][document_X]
    room_X = torch.ceil(lengths_S * share).long()[document_X]
    return active_XM & (count_XM <= room_X[:, None])


class Watch:
    """Counts for how many steps each layer has been dead or saturated."""

    def __init__(self) -> None:
        self.idle_LM: list[list[int]] = []
        self.full_LM: list[list[int]] = []

    def update(self, ratio_LM: np.ndarray) -> list[str]:
        """A sentence for each layer that has just been so for 100 steps."""
        said = []
        for name, hit_LM in (("idle_LM", ratio_LM < DEAD), ("full_LM", ratio_LM > SATURATED)):
            before = np.array(getattr(self, name) or np.zeros_like(ratio_LM), dtype=int)
            now = np.where(hit_LM, before + 1, 0)
            setattr(self, name, now.tolist())
            for layer in np.flatnonzero((now == PATIENCE).any(1)):
                what = "below 0.5 %" if name == "idle_LM" else "above 99.5 %"
                hint = "; balance.floor revives it" if name == "idle_LM" else "; it saves nothing"
                said.append(f"layer {layer}: activation {what} for {PATIENCE} steps{hint}")
        return said

    @property
    def dead(self) -> list[int]:
        """Layers with a module that is dead."""
        return np.flatnonzero((np.array(self.idle_LM) >= PATIENCE).any(-1)).tolist() if self.idle_LM else []

    @property
    def saturated(self) -> list[int]:
        """Layers with a module that is saturated."""
        return np.flatnonzero((np.array(self.full_LM) >= PATIENCE).any(-1)).tolist() if self.full_LM else []
