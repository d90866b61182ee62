"""Sparse Modular Activation: run each module only on the tokens that activate it. SeqBoat, section 3.

y_t = sum_i a_ti c_ti f_i(h)_t        a in {0, 1}: decision    c in (1/2, 1): confidence
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megaboat import kernels
from megaboat.kernels import ActiveRows, PendingRows
from megaboat.layers.configurator import Configurator, Routing
from megaboat.layers.documents import Documents


class SparseModule(Protocol):
    """What runs on the active rows: (R, D) -> (R, D) in the order of the rows, R = 0 included."""

    def __call__(self, h_RD: Tensor, rows: ActiveRows, docs: Documents, memory: Any = None) -> Tensor: ...


class SparseModularActivation(nn.Module):
    """A configurator with M decisions a token, independent of each other, and the M modules that they switch."""

    def __init__(self, width: int, modules: Iterable[nn.Module], arm: str = "tempered") -> None:
        super().__init__()
        self.units = nn.ModuleList(modules)
        self.configurator = Configurator(width, len(self.units), arm)
        self.run: Callable[..., Tensor] = operator.call
        """How a unit is called with its arguments: here, or by ranks that share their rows."""
        self.tell: Callable[..., Tensor] | None = None
        """What else `run` needs on the host: see `kernels.begin_plan`, given a module's decisions and the documents."""
        self.spare_rows = True
        """Units may be given rows that no token has (`kernels.few_sizes`); not where ranks share rows."""

    def route(
        self, h_BTD: Tensor, active_XM: Tensor | None = None, side: kernels.SideGradients | None = None
    ) -> Routing:
        """The decisions for each token, or those of `active_XM` again. `side`: see `kernels.fan_out`."""
        return self.configurator(h_BTD.flatten(0, 1), active_XM, side)

    def plan(self, routing: Routing, docs: Documents, spare_rows: bool = False) -> list[PendingRows]:
        """Start packing each module's rows: their numbers travel to the host while other work is launched."""
        multiple = kernels.few_sizes(routing.active_XM) if spare_rows and self.spare_rows else 1
        plans = []
        for active_X in routing.active_XM.unbind(1):
            tell = self.tell and partial(self.tell, active_X=active_X, docs=docs)
            plans.append(kernels.begin_plan(active_X, docs.cu_seqlens, multiple, tell))
        return plans

    def plan_within(self, capacity: int, routing: Routing, docs: Documents) -> tuple[Routing, list[ActiveRows]]:
        """So many rows for each module, without a word to the host; tokens that get none count as inactive."""
        rows = [kernels.plan_rows(active_X, docs.cu_seqlens, capacity) for active_X in routing.active_XM.unbind(1)]
        active_XM = torch.stack([each.row_X for each in rows], 1) >= 0
        overflow_M = torch.stack([each.overflow for each in rows])
        confidence_XM = routing.confidence_XM * active_XM
        return routing._replace(active_XM=active_XM, confidence_XM=confidence_XM, overflow_M=overflow_M), rows

    def forward(
        self,
        h_BTD: Tensor,
        routing: Routing,
        docs: Documents,
        memories: Sequence[Any] | None = None,
        plans: Sequence[PendingRows | ActiveRows] | None = None,
        base_BTD: Tensor | None = None,
        residual_BTD: Tensor | None = None,
        side: kernels.SideGradients | None = None,
    ) -> Tensor:
        """base + y, or y alone without a base; with a residual, SiLU(residual + that): (B, T, D).

        Every module is called whatever the decisions are: ranks must agree on calls and collectives.
        """
        h_XD = h_BTD.flatten(0, 1)
        y_XD = torch.zeros_like(h_XD) if base_BTD is None else base_BTD.flatten(0, 1)
        confidences = _columns(routing.confidence_XM)
        last = len(self.units) - 1
        for i, (unit, plan) in enumerate(zip(self.units, plans or self.plan(routing, docs), strict=True)):
            rows = plan.finish() if isinstance(plan, PendingRows) else plan
            memory = memories[i] if memories is not None else None
            out_RD = self.run(unit, kernels.compress(h_XD, rows, side), rows, docs, memory)
            residual_XD = residual_BTD.flatten(0, 1) if residual_BTD is not None and i == last else None
            y_XD = kernels.join_rows(y_XD, out_RD, confidences[i], rows, residual_XD)
        return y_XD.view_as(h_BTD)

    def step(self, h_BD: Tensor, routing: Routing, positions_B: Tensor, memories: Sequence[Any]) -> Tensor:
        """One token of each row, with the units' working memories."""
        y_BD = torch.zeros_like(h_BD)
        for i, unit in enumerate(self.units):
            out_BD = unit.step(h_BD, routing.active_XM[:, i], positions_B, memories[i])
            # Not `where(active, out, 0)`: a number there is copied to the GPU, which a graph's capture forbids.
            y_BD = y_BD + out_BD.masked_fill(~routing.active_XM[:, i, None], 0) * routing.confidence_XM[:, i, None]
        return y_BD.to(h_BD.dtype)


def _columns(x_XM: Tensor) -> Sequence[Tensor]:
    """(X,) for each module. By index, the gradient of each would be two launches; of the only one it is none."""
    return x_XM.unbind(1) if x_XM.shape[1] > 1 else [x_XM.flatten()]
