"""What a model finds where its decisions are given."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaboat.layers.documents import Documents
from megaboat.model.seqboat import SeqBoat


class Found(NamedTuple):
    nll: Tensor
    embedded: Tensor
    """The gradient at the embedded tokens, (B, T, D)."""
    weights: Tensor
    """The gradients of all weights, end to end, without the temperatures, which forced decisions leave out."""
    rows: list[int]
    """That the first layer's unit was given, by call."""


def assert_near(found: Found, expected: Found, bound: float, name: str) -> None:
    """Loss and gradients, by the norm of their difference over that of what is expected."""
    for value, truth in zip(found[:3], expected[:3], strict=True):
        assert float((value - truth).norm()) <= bound * float(truth.norm()), name


def read(model: SeqBoat, tokens: Tensor, targets: Tensor, docs: Documents, active_LXM: Tensor) -> Found:
    """Forward and backward with the decisions `active_LXM`."""
    embedded: list[Tensor] = []
    rows: list[int] = []
    hooks = [
        model.embedding.register_forward_hook(lambda module, inputs, output: embedded.append(output)),
        model.blocks[0].sma.units[0].register_forward_hook(lambda module, inputs, output: rows.append(len(output))),
    ]
    for block, active_XM in zip(model.blocks, active_LXM, strict=True):
        hooks.append(block.sma.configurator.register_forward_hook(partial(_decide, active_XM)))
    out = model(tokens, docs, targets)
    model.zero_grad()
    embedded[0].retain_grad()
    out.nll.backward()
    for hook in hooks:
        hook.remove()
    weights = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
    return Found(out.nll.detach(), embedded[0].grad.clone(), weights, rows)


def _decide(active_XM: Tensor, module: Any, inputs: Any, routing: Any) -> Any:
    confidence_XM = torch.sigmoid(routing.margin_XM / routing.log_temperature_M.exp()) * active_XM
    return routing._replace(active_XM=active_XM, confidence_XM=confidence_XM)
