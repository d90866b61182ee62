"""The pictures of a run, each a function from what was measured to a matplotlib figure.

They need no run folder, so that a trainer can hand them to TensorBoard while it runs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megaboat.tools.report_balance import balance_figures
from megaboat.tools.report_data import BASELINES, Evaluation, Metrics, Run
from megaboat.tools.report_style import (
    DARK,
    FONT,
    LIGHT,
    Theme,
    count_steps,
    dress,
    headline,
    layer_ticks,
    legend,
    log_y,
    new_figure,
    plain_numbers,
    readable_on,
    row_height,
    share_bar,
)

__all__ = ["DARK", "LIGHT", "Theme", "all_figures"]

HEATMAP_COLUMNS = 480
SMOOTHING_SHARE = 0.02
BASELINE_NAMES = {"unigram": "token unigram", "bigram": "token bigram", "zlib": "zlib -9"}
ALL_TEXT = "all text"


def all_figures(run: Run, theme: Theme = LIGHT) -> dict[str, Figure]:
    """Every picture that this run has data for, by the name of its file, in the order of the page."""
    last = run.last_evaluation
    figures = {"loss": loss_figure(run.metrics, run.evaluations, theme)}
    if last is not None:
        figures["bits_per_byte"] = bits_per_byte_figure(last, run.baselines, theme)
    if run.metrics.activation_SL.shape[1]:
        figures["activation_by_step"] = activation_by_step_figure(run.metrics, theme)
    if last is not None and last.overall.activation:
        figures["activation_by_domain"] = activation_by_domain_figure(last, theme)
    figures |= balance_figures(run.details, theme)
    figures["schedule"] = schedule_figure(run.metrics, theme)
    figures["throughput"] = throughput_figure(run.metrics, theme)
    return figures


def loss_figure(metrics: Metrics, evaluations: Sequence[Evaluation] = (), theme: Theme = LIGHT) -> Figure:
    """Training loss of every step, smoothed, and the held-out loss wherever it was measured."""
    figure = new_figure(theme, 4.2)
    axes = figure.subplots()
    headline(figure, theme, "Loss")
    dress(axes, theme, "", "training step", "nats per token (lower is better)")
    width = smoothing_width(len(metrics.step))
    smooth = smoothed(metrics["loss"], width)
    label = "every step" if width > 1 else "training loss"
    axes.plot(metrics.step, metrics["loss"], color=theme.faint if width > 1 else theme.model, linewidth=1, label=label)
    if width > 1:
        label = f"training, mean of {width} steps (last {smooth[-1]:.2f})"
        axes.plot(metrics.step, smooth, color=theme.model, linewidth=2.2, label=label)
    for split, marker in zip(dict.fromkeys(e.split for e in evaluations), "oDs^v", strict=False):
        points = [e for e in evaluations if e.split == split]
        nll = [e.overall.nll for e in points]
        label = f"held-out text: {split} (last {nll[-1]:.2f})"
        axes.scatter([e.step for e in points], nll, s=60, marker=marker, color=theme.heldout, zorder=5, label=label)
    count_steps(axes)
    legend(axes, theme, loc="upper right")
    return figure


def bits_per_byte_figure(
    evaluation: Evaluation, baselines: dict[str, dict[str, float]], theme: Theme = LIGHT
) -> Figure:
    """The model beside its baselines, a row for each domain."""
    rows = [ALL_TEXT, *sorted(evaluation.domains, key=lambda d: evaluation.domains[d].bits_per_byte)]
    height = np.arange(len(rows))
    figure = new_figure(theme, 1.9 + row_height(len(rows)) * len(rows))
    axes = figure.subplots()
    headline(figure, theme, f"Bits per byte on held-out text, step {evaluation.step:,}")
    dress(axes, theme, "", "bits per byte (lower is better)")
    shown = {"model": ([_bits(evaluation, row) for row in rows], "o", theme.model)}
    for name, marker, color in zip(BASELINES, "^sX", theme.baselines, strict=True):
        scores = baselines.get(name, {})
        bits = [scores.get("overall" if row == ALL_TEXT else row, np.nan) for row in rows]
        if np.isfinite(bits).any():
            shown[name] = (bits, marker, color)
    table = np.array([bits for bits, _, _ in shown.values()])
    low, high = np.fmin.reduce(table), np.fmax.reduce(table)
    axes.hlines(height, low, high, color=theme.grid, linewidth=5, zorder=1)
    for name, (bits, marker, color) in reversed(shown.items()):
        size, layer = (105, 3) if name == "model" else (62, 4)  # a baseline as good as the model lies on it, in sight
        label = BASELINE_NAMES.get(name, "this model")
        axes.scatter(bits, height, s=size, marker=marker, color=color, edgecolor=theme.paper, zorder=layer, label=label)
    for row, value in enumerate(shown["model"][0]):
        if np.isfinite(value):
            place: dict[str, Any] = {"xytext": (-11, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
            axes.annotate(f"{value:.2f}", (low[row], row), color=theme.model, fontsize=FONT, fontweight="bold", **place)
    axes.set_yticks(height, rows, color=theme.ink, fontsize=FONT)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(False, axis="y")
    legend(figure, theme, handles=axes.collections[:0:-1], loc="outside lower left", ncols=4)
    return figure


def _bits(evaluation: Evaluation, row: str) -> float:
    return (evaluation.overall if row == ALL_TEXT else evaluation.domains[row]).bits_per_byte


def activation_by_step_figure(metrics: Metrics, theme: Theme = LIGHT) -> Figure:
    """Heatmap of layer x training step, the mean over layers above it."""
    grid_LX, first, last = step_grid(metrics)
    layers = len(grid_LX)
    figure = new_figure(theme, 2.6 + min(4.5, 0.22 * max(layers, 8)))
    top, main = figure.subplots(2, 1, sharex=True, height_ratios=[1, 3.2])
    headline(figure, theme, "Activation while it trains")
    dress(top, theme, "", "", "all layers")
    known = np.isfinite(metrics.activation_SL).any(axis=1)
    mean = np.nanmean(metrics.activation_SL[known], axis=1)
    top.plot(metrics.step[known], mean, color=theme.model, linewidth=1.6)
    top.set_ylim(0, 1)
    top.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    dress(main, theme, "", "training step", "layer (0: next to the input)", grid=False)
    extent = (first - 0.5, last + 0.5, -0.5, layers - 0.5)
    options = {"cmap": theme.colormap(), "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    image = main.imshow(grid_LX, origin="lower", aspect="auto", extent=extent, **options)
    layer_ticks(main.yaxis, layers)
    count_steps(main)
    share_bar(figure, image, main, theme, "active tokens")
    return figure


def step_grid(metrics: Metrics) -> tuple[np.ndarray, int, int]:
    """(activation_LX, first step, last step): a column a step, NaN where one is missing.

    Long runs have several steps in a column, their mean.
    """
    first, last = int(metrics.step[0]), int(metrics.step[-1])
    bins = min(last - first + 1, HEATMAP_COLUMNS)
    column_S = (metrics.step - first) * bins // (last - first + 1)
    known_SL = np.isfinite(metrics.activation_SL)
    total_XL = np.zeros((bins, known_SL.shape[1]))
    count_XL = np.zeros_like(total_XL)
    np.add.at(total_XL, column_S, np.where(known_SL, metrics.activation_SL, 0.0))
    np.add.at(count_XL, column_S, known_SL)
    mean_XL = np.divide(total_XL, count_XL, out=np.full_like(total_XL, np.nan), where=count_XL > 0)
    return mean_XL.T, first, last


def activation_by_domain_figure(evaluation: Evaluation, theme: Theme = LIGHT) -> Figure:
    """Heatmap of domain x layer on held-out text: all of it on top, then the domains, the busiest first."""
    domains = {name: score.activation for name, score in evaluation.domains.items() if score.activation}
    rows = [ALL_TEXT, *sorted(domains, key=lambda name: -float(np.mean(domains[name])))]
    table_DL = np.array([domains.get(row, evaluation.overall.activation) for row in rows], dtype=float)
    layers = table_DL.shape[1]
    figure = new_figure(theme, 1.6 + row_height(len(rows)) * len(rows))
    axes = figure.subplots()
    headline(figure, theme, f"Activation by domain and layer on held-out text, step {evaluation.step:,}")
    dress(axes, theme, "", "layer (0: next to the input)", grid=False)
    colors = theme.colormap()
    image = axes.imshow(table_DL, aspect="auto", cmap=colors, vmin=0, vmax=1, interpolation="nearest")
    axes.axhline(0.5, color=theme.paper, linewidth=5)
    axes.set_yticks(range(len(rows)), rows, color=theme.ink, fontsize=FONT)
    layer_ticks(axes.xaxis, layers)
    if layers <= 16:
        for (row, layer), value in np.ndenumerate(table_DL):
            ink = readable_on(colors(value))
            axes.text(layer, row, f"{100 * value:.0f}", color=ink, ha="center", va="center", fontsize=FONT - 1)
    share_bar(figure, image, axes, theme, "active tokens")
    return figure


def schedule_figure(metrics: Metrics, theme: Theme = LIGHT) -> Figure:
    """Learning rate and gradient norm."""
    figure = new_figure(theme, 3.9)
    top, bottom = figure.subplots(2, 1, sharex=True)
    dress(top, theme, "Learning rate", "", "rate")
    top.plot(metrics.step, metrics["lr"], color=theme.model, linewidth=1.8)
    top.set_ylim(bottom=0)
    top.locator_params(axis="y", nbins=4)
    top.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    top.yaxis.get_offset_text().set_color(theme.muted)
    dress(bottom, theme, "Gradient norm, before clipping", "training step", "norm")
    norm = metrics["grad_norm"]
    bottom.plot(metrics.step, norm, color=theme.model, linewidth=1)
    positive = norm[np.isfinite(norm) & (norm > 0)]
    if len(positive) and positive.max() > 20 * positive.min():
        log_y(bottom)
    else:
        bottom.set_ylim(bottom=0)
    count_steps(bottom)
    return figure


def throughput_figure(metrics: Metrics, theme: Theme = LIGHT) -> Figure:
    """Tokens per second and, where they are known, model FLOP utilisation and the imbalance between ranks."""
    panels = [("tokens_per_second", "Speed", "tokens / s")]
    if metrics.known("mfu"):
        panels.append(("mfu", "Model FLOP utilisation", "of peak"))
    if metrics.known("imbalance") and np.nanmax(metrics["imbalance"]) > 1:
        panels.append(("imbalance", "Imbalance between ranks, most / mean", "ratio"))
    figure = new_figure(theme, 0.9 + 1.8 * len(panels))
    columns = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, title, unit) in zip(columns, panels, strict=True):
        values = metrics[name]
        dress(axes, theme, title, "", unit)
        axes.plot(metrics.step, values, color=theme.model, linewidth=1.2)
        if np.isfinite(values).any():
            median = float(np.nanmedian(values))
            text = f"{median:,.0f}" if median >= 100 else f"{median:.3g}"
            axes.axhline(median, color=theme.heldout, linewidth=1.2, linestyle="--", label=f"median {text}")
            legend(axes, theme, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
        plain_numbers(axes.yaxis)
        axes.set_ylim(bottom=1 if name == "imbalance" else 0)
    columns[-1].set_xlabel("training step")
    count_steps(columns[-1])
    return figure


def smoothing_width(steps: int) -> int:
    """How many steps the smoothed loss averages; 1: too short to smooth."""
    return max(1, int(SMOOTHING_SHARE * steps))


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the `width` values around each, those that are numbers; fewer at both ends."""
    known = np.isfinite(values)
    total = np.cumsum(np.concatenate([[0.0], np.where(known, values, 0.0)]))
    count = np.cumsum(np.concatenate([[0], known]))
    place = np.arange(len(values))
    start = np.maximum(place - width // 2, 0)
    end = np.minimum(place + (width + 1) // 2, len(values))
    n = count[end] - count[start]
    return np.divide(total[end] - total[start], n, out=np.full(len(values), np.nan), where=n > 0)
