"""One checkpoint at other thresholds: quality against work, without training again.

A bias b moves every threshold by b temperatures of its layer, so that more (b > 0) or fewer tokens are active; inf
activates all tokens, -inf none. The model has learned at bias 0.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from megaboat.errors import BadInput
from megaboat.layers.configurator import Configurator
from megaboat.layers.documents import Documents
from megaboat.model.build import LanguageModel
from megaboat.model.flops import Work, count_work, unit_flops
from megaboat.model.seqboat import ModelOutput, SeqBoat
from megaboat.tools.report_style import LIGHT, Theme, dress, new_figure

HEADS = ("bias", "active", "nll", "bits/byte", "MFLOPs/token", "of always on")


def curve(model: LanguageModel, biases: list[float], evaluate: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    """A point for each bias; `evaluate(forward)` gives the figures of held-out text.

    Raises BadInput for a dense model.
    """
    if not isinstance(model, SeqBoat):
        raise BadInput("--activation-bias: a dense model has no threshold to move")
    unit = unit_flops(model.config)
    points = []
    for bias in biases:
        counter = _Counter(model)
        with biased(model, bias):
            overall = evaluate(counter)["overall"]
        rows, pairs = (float(part.sum()) for part in counter.work)
        dense = unit.token * counter.tokens + unit.row * counter.slots + unit.pair * counter.dense_pairs
        flops = unit.token * counter.tokens + unit.row * rows + unit.pair * pairs
        ratios = overall["activation_ratio"]
        points.append(
            {
                "bias": bias,
                "activation": sum(ratios) / len(ratios),
                "activation_ratio": ratios,
                "nll": overall["nll"],
                "bits_per_byte": overall["bits_per_byte"],
                "flops_per_token": flops / counter.tokens,
                "of_always_on": flops / dense,
            }
        )
    return points


@contextmanager
def biased(model: SeqBoat, bias: float) -> Iterator[None]:
    """The model with its thresholds lowered by `bias` temperatures."""
    configurators = [module for module in model.modules() if isinstance(module, Configurator)]
    before = [configurator.threshold_M.clone() for configurator in configurators]
    for configurator in configurators:
        configurator.threshold_M -= bias * configurator.log_temperature.detach().exp()
    try:
        yield
    finally:
        for configurator, threshold_M in zip(configurators, before, strict=True):
            configurator.threshold_M.copy_(threshold_M)


class _Counter:
    """The model as `evaluate` calls it, with the work that it does added up."""

    def __init__(self, model: SeqBoat) -> None:
        self._model = model
        self.tokens, self.slots, self.dense_pairs = 0, 0, 0.0
        self.work: Work = Work(torch.zeros(()), torch.zeros(()))

    def __call__(self, tokens_BT: Tensor, docs: Documents, targets_BT: Tensor, per_token: bool) -> ModelOutput:
        output = self._model(tokens_BT, docs, targets_BT, per_token=per_token)
        active_LXM = torch.stack([routing.active_XM for routing in output.routings])
        window = self._model.config.window
        work = count_work(active_LXM, docs.cu_seqlens, window)
        self.work = Work(*(old + new.cpu().sum() for old, new in zip(self.work, work, strict=True)))
        self.tokens += tokens_BT.numel()
        self.slots += active_LXM.numel()
        dense = count_work(torch.ones_like(active_LXM[:1, :, :1]), docs.cu_seqlens, window)
        self.dense_pairs += float(dense.pairs_LM.sum()) * active_LXM.shape[0] * active_LXM.shape[2]
        return output


def as_json(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points with an infinite bias as a word: JSON has no number for it."""
    return [point | ({} if math.isfinite(point["bias"]) else {"bias": str(point["bias"])}) for point in points]


def table(points: list[dict[str, Any]]) -> str:
    """One line a bias."""
    lines = [HEADS]
    for point in points:
        megaflops = f"{point['flops_per_token'] / 1e6:.2f}"
        quality = (f"{point['nll']:.4f}", f"{point['bits_per_byte']:.4f}")
        lines.append(
            (f"{point['bias']:+g}", f"{point['activation']:.3f}", *quality, megaflops, f"{point['of_always_on']:.3f}")
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def figure(points: list[dict[str, Any]], theme: Theme = LIGHT) -> Figure:
    """Bits per byte against FLOPs, each point with its bias and activation; the trained one is marked."""
    drawn = new_figure(theme, 4.4)
    axes = drawn.subplots()
    dress(axes, theme, "One model at other thresholds", "MFLOPs a token, forward", "bits per byte (lower is better)")
    ordered = sorted(points, key=lambda point: point["flops_per_token"])
    x, y = [point["flops_per_token"] / 1e6 for point in ordered], [point["bits_per_byte"] for point in ordered]
    axes.plot(x, y, color=theme.model, marker="o")
    for point, a, b in zip(ordered, x, y, strict=True):
        name = f"{point['bias']:+g}: {100 * point['activation']:.0f} %"
        axes.annotate(name, (a, b), xytext=(5, 7), textcoords="offset points", color=theme.muted, fontsize=9)
        if point["bias"] == 0:
            axes.scatter([a], [b], s=130, facecolor="none", edgecolor=theme.heldout, linewidth=2, zorder=5)
    return drawn


def parse(text: str) -> list[float]:
    """Numbers from `-1,0,inf`."""
    with suppress(ValueError):
        biases = [float(part) for part in text.split(",")]
        if not any(math.isnan(bias) for bias in biases):
            return biases
    raise argparse.ArgumentTypeError(f"{text!r}, expected numbers such as -1,0,inf")
