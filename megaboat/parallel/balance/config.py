"""Options of the balance between ranks and of the control of activation."""

from typing import Annotated, Literal

import pydantic

from megaboat.config import Section

Share = Annotated[float, pydantic.Field(gt=0, lt=1)]


class BalanceConfig(Section):
    """Section `balance` of a run. `assignment` and `exchange` change no gradient;
    everything below `trace_every` changes the model."""

    assignment: Literal["cost", "none", "domain"] = "cost"
    """cost: deal the windows of each global batch so that ranks have about the same work. none: in their order. domain:
    sorted by source, as shards of one source a rank would be: the bad case, to measure against."""
    exchange: int = pydantic.Field(1, gt=0)
    """So many neighbouring ranks compute the active rows of each layer in even parts, where `assignment` leaves much:
    ZeRO-3, few windows a rank; for ranks that NVLink joins. 1: each its own."""
    trace_every: int = pydantic.Field(100, ge=0)
    """Steps between lines of `trace.jsonl`, which `megaboat balance simulate` replays; 0: none."""
    budget: Share | None = None
    """Share of tokens that each layer activates, held by moving its threshold, instead of `floor` and `ceil`;
    None: what the model learns."""
    floor: float = pydantic.Field(0.0, ge=0, lt=1)
    """Smallest share: the threshold of a layer below it is lowered until the layer is back. 0: layers may die."""
    ceil: float = pydantic.Field(1.0, gt=0, le=1)
    """Largest share, in the same way."""
    ratio_loss: float = pydantic.Field(0.0, ge=0)
    """Weight of a loss that pulls each layer towards `ratio_target`; its gradient reaches skipped tokens too."""
    ratio_target: Share = 0.5
    """Share of tokens that the ratio loss pulls to."""
    z_loss: float = pydantic.Field(0.0, ge=0)
    """Weight of a loss on large logits."""
    capacity: Share | None = None
    """Memory valve: of each document at most this share of tokens is active in a layer, later ones are turned away and
    counted; None: no valve."""

    @pydantic.model_validator(mode="after")
    def _shares_agree(self) -> "BalanceConfig":
        if self.floor >= self.ceil:
            raise ValueError(f"floor {self.floor:g} is not below ceil {self.ceil:g}")
        if self.budget is not None and (self.floor > 0 or self.ceil < 1):
            raise ValueError(f"budget {self.budget:g} alone decides the share; leave out floor and ceil")
        return self
