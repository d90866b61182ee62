"""One SeqBoat layer, in the order of the paper's equations (SeqBoat, section 3.2; `decoder` form)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaboat import kernels
from megaboat.kernels import ActiveRows, PendingRows
from megaboat.layers.configurator import Routing
from megaboat.layers.documents import Documents
from megaboat.layers.feedforward import FeedForward
from megaboat.layers.gau import GatedAttentionUnit
from megaboat.layers.linear import Linear
from megaboat.layers.memory import WorkingMemory
from megaboat.layers.norm import BranchNorm
from megaboat.layers.sma import SparseModularActivation
from megaboat.layers.ssm import SSMS
from megaboat.model.config import SeqBoatConfig


@dataclass
class LayerState:
    """What a layer remembers between calls: the state of its `ssm`, (B, D) of S5, and each unit's working memory."""

    ema_BDN: Tensor
    memories: list[WorkingMemory]


class SeqBoatBlock(nn.Module):
    """x -> SiLU( linear(h) + sma(h) + x ) with h = SiLU(EMA(norm x)); then, if configured, x + ffn(norm x)."""

    def __init__(self, config: SeqBoatConfig) -> None:
        super().__init__()
        width, value_dim, heads = config.width, config.value_dim, config.heads
        assert value_dim is not None, "filled from the style by the config's validator"
        assert heads is not None, "as is this"
        self.norm = BranchNorm(width)
        self.ema = SSMS[config.ssm](width, config.ema_order)
        self.linear = Linear(width, width)
        units = [
            GatedAttentionUnit(width, config.qk_dim, value_dim, config.window, heads, config.rope_base, config.qk_maps)
            for _ in range(config.modules)
        ]
        self.sma = SparseModularActivation(width, units, config.configurator)
        self.dropout = nn.Dropout(config.dropout)
        self.ffn_norm = BranchNorm(width) if config.ffn_dim else None
        self.ffn = FeedForward(width, config.ffn_dim) if config.ffn_dim else None

    def forward(
        self,
        x_BTD: Tensor,
        docs: Documents,
        state: LayerState | None = None,
        active_XM: Tensor | None = None,
        capacity: int | None = None,
    ) -> tuple[Tensor, Routing]:
        """The layer's output and its decisions. A `state` is read and brought up to date in place.

        capacity: the rows of each module, whatever is active, so that all shapes are known before.
        """
        normal_BTD, x_BTD = self.norm(x_BTD)
        h_BTD, ema_BDN = self.ema(normal_BTD, docs.first_BT, state.ema_BDN if state else None)
        h_BTD = self.dropout(h_BTD)
        side = kernels.side_gradients(h_BTD)
        for_route_BTD, for_linear_BTD, h_BTD = kernels.fan_out(h_BTD, 3, side)
        routing = self.sma.route(for_route_BTD, active_XM, side)
        # The linear map runs between the plan and its use, so that the host does not wait for the plan's sizes.
        plans: Sequence[PendingRows | ActiveRows]
        if capacity is None:
            plans = self.sma.plan(routing, docs, spare_rows=state is None)
        else:
            routing, plans = self.sma.plan_within(capacity, routing, docs)
        base_BTD = self.linear(for_linear_BTD)
        memories = state.memories if state else None
        if self.training and self.dropout.p > 0:
            y_BTD = self.sma(h_BTD, routing, docs, memories, plans, base_BTD, side=side)
            x_BTD = F.silu(self.dropout(y_BTD).to(x_BTD.dtype) + x_BTD)
        else:
            x_BTD = self.sma(h_BTD, routing, docs, memories, plans, base_BTD, x_BTD, side)
        if state is not None:
            state.ema_BDN = ema_BDN
        return self._feed_forward(x_BTD), routing

    @torch.no_grad()
    def calibrate(self, x: Sequence[Tensor], docs: Sequence[Documents]) -> list[Tensor]:
        """Set the configurator so that half of all tokens activate each module; what comes of each x (B, T, D) then."""
        read = [self.ema(self.norm(x_BTD)[0], of.first_BT)[0].flatten(0, 1) for x_BTD, of in zip(x, docs, strict=True)]
        self.sma.configurator.calibrate(torch.cat(read))
        del read
        return [self(x_BTD, of)[0] for x_BTD, of in zip(x, docs, strict=True)]

    def step(self, x_BD: Tensor, positions_B: Tensor, state: LayerState) -> tuple[Tensor, Routing]:
        """One token of each row: constant time and memory, no host synchronisation, `state` written where it lies."""
        h_BD, ema_BDN = self.ema.step(self.norm(x_BD)[0], state.ema_BDN)
        state.ema_BDN.copy_(ema_BDN)
        routing = self.sma.route(h_BD[:, None])
        y_BD = self.linear(h_BD) + self.sma.step(h_BD, routing, positions_B, state.memories)
        return self._feed_forward(F.silu(y_BD.to(x_BD.dtype) + x_BD)), routing

    def new_state(self, rows: int, like: Tensor) -> LayerState:
        """The state before any token. `like` gives device and dtype of the memory; the EMA state is fp32 or fp64."""
        return LayerState(self.ema.new_state(rows), [unit.new_memory(rows, like) for unit in self.sma.units])

    def _feed_forward(self, x: Tensor) -> Tensor:
        if self.ffn is None:
            return x
        normal, x = self.ffn_norm(x)
        return x + self.dropout(self.ffn(normal)).to(x.dtype)
