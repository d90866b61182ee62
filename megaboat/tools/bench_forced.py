"""Decisions that a benchmark gives to a model: so many active tokens, spread in one of two ways."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megaboat.layers.configurator import Configurator

RUN_LENGTH = 64


@contextmanager
def forced(
    model: nn.Module, tokens: int, ratio: float | None, pattern: str | None, device: torch.device
) -> Iterator[float]:
    """Every configurator of `model` is given its decisions, others in each layer; None: it decides itself.

    Yields the share of tokens that the busiest module activates, 1 where that is not known.
    """
    if ratio is None:
        yield 1.0
        return
    hooks, busiest = [], 0.0
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, Configurator):
            modules = len(module.log_temperature)
            columns = [_decisions(tokens, ratio, pattern, generator) for _ in range(modules)]
            active_XM = torch.stack(columns, 1)
            busiest = max(busiest, float(active_XM.float().mean(0).max()))
            active_XM = active_XM.to(device)

            def force(_: nn.Module, args: tuple, active_XM: Tensor = active_XM) -> tuple:
                return (args[0], active_XM, *args[2:])

            hooks.append(module.register_forward_pre_hook(force))
    try:
        yield busiest
    finally:
        for hook in hooks:
            hook.remove()


def _decisions(tokens: int, ratio: float, pattern: str | None, generator: torch.Generator) -> Tensor:
    """bool (tokens,): each token by itself, or in runs whose lengths are geometric with a mean of RUN_LENGTH."""
    if pattern == "random" or ratio == 1:
        return torch.rand(tokens, generator=generator) < ratio
    count = 2 * tokens // RUN_LENGTH + 64
    on, off = RUN_LENGTH, RUN_LENGTH * (1 - ratio) / ratio
    means = torch.tensor([on, off]).repeat(count)
    lengths = (-means * torch.rand(2 * count, generator=generator).log()).ceil().long().clamp_min(1)
    values = torch.tensor([True, False]).repeat(count)
    runs = values.repeat_interleave(lengths)
    return runs.roll(int(torch.randint(RUN_LENGTH, (1,), generator=generator)))[:tokens]
