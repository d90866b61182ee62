"""The report's pictures of what switches do inside, and of how evenly ranks were loaded."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megaboat.tools.report_style import LIGHT, Theme, count_steps, dress, headline, layer_ticks, legend, new_figure

SERIES = ("imbalance_cost", "imbalance_rows", "imbalance_time", "rule_of_thumb", "cv1")
HEADROOM = 1.5  # the legend lies above the highest peak
CAPTIONS = {
    "inside_the_switches": "Two things about the active tokens, layer by layer. Confidence: how sure the switch was, "
    "from 50 % (a toss-up) to 100 %. Reach: how many tokens back the oldest one lies that an active token can look "
    "at. The fewer tokens are active, the further back the same number of them reaches.",
    "balance": "When several processes train together, each step lasts as long as the one with the most to do. 1 means "
    "that all had the same; 1.1, that the busiest had a tenth more than the average. The dashed line is what to expect "
    "where nobody balances.",
}


@dataclass(frozen=True)
class Details:
    """What `metrics.jsonl` says under `balance` in every step and under `layers` in every tenth."""

    step_S: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    series: dict[str, np.ndarray] = field(default_factory=dict)
    step_D: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    confidence_DL: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    span_DL: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))

    @property
    def several_ranks(self) -> bool:
        """Whether there was anything to balance: alone, every imbalance is 1."""
        return bool(len(self.step_S)) and bool(np.nanmax(self.series["imbalance_rows"]) > 1)


def build_details(rows: list[dict[str, Any]]) -> Details:
    """From the lines of metrics.jsonl; a step that is there twice counts as it was done last. Older runs have none."""
    by_step = {int(row.get("step", -1)): row for row in rows if isinstance(row.get("balance"), dict)}
    by_step.pop(-1, None)
    kept = [by_step[step] for step in sorted(by_step)]
    if not kept:
        return Details()
    series = {name: np.array([row["balance"].get(name, np.nan) for row in kept], float) for name in SERIES}
    detailed = [row for row in kept if isinstance(row.get("layers"), dict)]
    confidence, span = (np.array([row["layers"][name] for row in detailed], float) for name in ("confidence", "span"))
    steps_S, steps_D = (np.array([row["step"] for row in part], int) for part in (kept, detailed))
    return Details(steps_S, series, steps_D, confidence, span)


def balance_figures(details: Details, theme: Theme = LIGHT) -> dict[str, Figure]:
    """Those of the two pictures that there is something for."""
    figures = {}
    if len(details.step_D):
        figures["inside_the_switches"] = inside_figure(details, theme)
    if details.several_ranks:
        figures["balance"] = imbalance_figure(details, theme)
    return figures


def inside_figure(details: Details, theme: Theme = LIGHT) -> Figure:
    """Heatmaps of layer x step: confidence of active tokens, and their reach."""
    layers = details.confidence_DL.shape[1]
    figure = new_figure(theme, 2.2 + 2 * min(3.5, 0.22 * max(layers, 7)))
    panels = figure.subplots(2, 1, sharex=True)
    headline(figure, theme, "Inside the switches")
    unused_DL = details.confidence_DL == 0
    confidence_DL = np.where(unused_DL, np.nan, 100 * details.confidence_DL)
    span_DL = np.where(unused_DL, np.nan, details.span_DL)
    for axes, table_DL, title, unit, limits in (
        (panels[0], confidence_DL, "Confidence", "%", (50, 100)),
        (panels[1], span_DL, "Reach", "tokens back", (0, None)),
    ):
        dress(axes, theme, title, "", "layer", grid=False)
        # Columns lie between the steps that were looked at, so that they touch.
        width = details.step_D[-1] - details.step_D[-2] if len(table_DL) > 1 else 1
        edges = np.append(details.step_D, details.step_D[-1] + width)
        borders = np.arange(layers + 1) - 0.5
        image = axes.pcolormesh(edges, borders, table_DL.T, cmap=theme.colormap(), vmin=limits[0], vmax=limits[1])
        layer_ticks(axes.yaxis, layers)
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.ax.tick_params(colors=theme.muted)
        bar.outline.set_visible(False)
        bar.set_label(unit, color=theme.ink)
    panels[1].set_xlabel("training step")
    count_steps(panels[1])
    return figure


def imbalance_figure(details: Details, theme: Theme = LIGHT) -> Figure:
    """Most over mean of the ranks' cost and time by step, and the rule of thumb for windows that nobody deals."""
    figure = new_figure(theme, 3.6)
    axes = figure.subplots()
    headline(figure, theme, "Load of the busiest process over the mean")
    dress(axes, theme, "", "training step", "ratio")
    for name, label, color in (
        ("imbalance_time", "time at work", theme.faint),
        ("imbalance_cost", "arithmetic", theme.model),
    ):
        values = details.series[name]
        axes.plot(
            details.step_S, values, color=color, linewidth=1.4, label=f"{label} (median {np.nanmedian(values):.3f})"
        )
    rule = details.series["rule_of_thumb"]
    axes.plot(
        details.step_S, rule, color=theme.muted, linestyle="--", linewidth=1.2, label="expected without balancing"
    )
    axes.set_ylim(1, 1 + HEADROOM * (axes.get_ylim()[1] - 1))
    count_steps(axes)
    legend(axes, theme, loc="upper right")
    return figure


def describe(details: Details) -> dict[str, str]:
    """Text alternatives by picture."""
    told = {}
    if len(details.step_D):
        last = [
            f"layer {layer} {100 * confidence:.0f} % and {span:.0f} tokens"
            for layer, (confidence, span) in enumerate(zip(details.confidence_DL[-1], details.span_DL[-1], strict=True))
        ]
        told["inside_the_switches"] = (
            f"Heatmaps of confidence and reach by layer and step. At the end: {', '.join(last)}."
        )
    if details.several_ranks:
        medians = {name: float(np.nanmedian(details.series[name])) for name in ("imbalance_cost", "imbalance_time")}
        told["balance"] = (
            f"Line chart of the busiest process over the mean: arithmetic {medians['imbalance_cost']:.3f}, "
            f"time {medians['imbalance_time']:.3f} in the median step."
        )
    return told
