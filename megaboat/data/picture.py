"""The picture of `megaboat data stats`: a row for each source, its size beside the lengths of its documents."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megaboat.data.stats import SourceStats

INK, PALE, BAR = "#1b2a33", "#6b7a83", "#2a6f97"
MAP = "Blues"  # one hue from white: it keeps its order in grey and for colour-blind readers


def draw_stats(stats: list[SourceStats], title: str, path: Path) -> None:
    """Write a picture (PNG, SVG or PDF by the suffix) of the sources of one split."""
    rows = len(stats)
    figure = Figure(figsize=(11, 1.6 + 0.36 * rows), layout="constrained", facecolor="white")
    sizes, lengths = figure.subplots(1, 2, width_ratios=[1, 1.6], sharey=True)
    _draw_sizes(sizes, stats)
    _draw_lengths(lengths, stats)
    sizes.set_yticks(range(rows), [entry.name for entry in stats])
    sizes.set_ylim(rows - 0.5, -0.5)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12, fontweight="bold")
    for axes in (sizes, lengths):
        axes.tick_params(length=0, colors=INK, labelsize=9)
        axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=160)


def _draw_sizes(axes: Axes, stats: list[SourceStats]) -> None:
    tokens = [entry.tokens for entry in stats]
    total, widest = sum(tokens), max(tokens)
    axes.barh(range(len(stats)), tokens, height=0.62, color=BAR)
    for row, entry in enumerate(stats):
        note = f" {_short(entry.tokens)}  {entry.tokens / total:.1%}"
        axes.text(entry.tokens, row, note, va="center", color=INK, fontsize=9)
    axes.set_xlim(0, widest * 1.45)
    axes.set_xticks([])
    axes.set_title("tokens, share", loc="left", color=PALE, fontsize=10)


def _draw_lengths(axes: Axes, stats: list[SourceStats]) -> None:
    counts = np.array([entry.histogram for entry in stats], float)
    used = np.flatnonzero(counts.sum(axis=0))
    first, last = int(used[0]), int(used[-1])
    shares = counts[:, first : last + 1] / counts.sum(axis=1, keepdims=True)
    axes.imshow(shares, aspect="auto", cmap=MAP, vmin=0, extent=(first, last + 1, len(stats) - 0.5, -0.5))
    medians = [np.log2(entry.median) for entry in stats]
    axes.plot(medians, range(len(stats)), "|", color="#c8553d", markersize=13, markeredgewidth=2)
    ticks = range(first, last + 2, max(1, (last + 1 - first) // 6))
    axes.set_xticks(list(ticks), [_power(tick) for tick in ticks])
    axes.set_title("documents by length in tokens (darker: more; mark: median)", loc="left", color=PALE, fontsize=10)


def _short(count: int) -> str:
    """1234567 as 1.2M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _power(exponent: int) -> str:
    """2 to the exponent, in the k and M of computers: 4096 as 4k."""
    unit, size = ("", 0) if exponent < 10 else ("k", 10) if exponent < 20 else ("M", 20)
    return f"{1 << (exponent - size)}{unit}"
