"""Parameter groups for AdamW and learning-rate schedules as pure functions of the step."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic

from megaboat.config import Section

if TYPE_CHECKING:  # a configuration can be checked without torch
    from torch import Tensor, nn

Share = Annotated[float, pydantic.Field(ge=0, lt=1)]


class OptimConfig(Section):
    """AdamW and its learning rate."""

    lr: float = pydantic.Field(1e-3, ge=0)
    """The highest learning rate of the schedule."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of AdamW's first and second moments."""
    eps: float = pydantic.Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = pydantic.Field(0.1, ge=0)
    """On weight matrices only: not on biases, norms, gains, EMA coefficients and temperatures."""
    clip: float = pydantic.Field(1.0, ge=0)
    """Largest norm of the gradient; 0: no clipping."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """How the rate falls after the warm-up. wsd: stable, then linear decay over the last `decay` of the run."""
    warmup: float = pydantic.Field(0.05, ge=0, lt=1)
    """Share of the run in which the rate rises from 0."""
    decay: float = pydantic.Field(0.2, gt=0, le=1)
    """wsd only: share of the run in which the rate falls."""
    final: float = pydantic.Field(0.1, ge=0, le=1)
    """Rate at the end, as a share of `lr`."""


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of step `step` (the first is 0) in a run of `steps`."""
    warmup = config.warmup * steps
    if step + 1 < warmup:
        return config.lr * (step + 1) / warmup
    progress = min(1.0, (step + 1 - warmup) / max(1.0, steps - warmup))
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        level = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "linear":
        level = 1 - progress
    else:
        level = min(1.0, (steps - step - 1) / (config.decay * steps))
    return config.lr * (config.final + (1 - config.final) * level)


def parameter_groups(model: "nn.Module", outlines: Mapping[str, "Tensor"], weight_decay: float) -> list[dict]:
    """Two groups of AdamW: the matrices of linear maps and embeddings decay, everything else does not.

    outlines: tensors of the shapes that the parameters have when they are whole.
    """
    matrices = {name for name, outline in outlines.items() if name.endswith(".weight") and outline.ndim == 2}
    decayed = [parameter for name, parameter in model.named_parameters() if name in matrices]
    others = [parameter for name, parameter in model.named_parameters() if name not in matrices]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
