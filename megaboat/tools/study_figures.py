"""The pictures of a study, each a function from its findings to a matplotlib figure."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megaboat.tools.report_figures import smoothed, smoothing_width
from megaboat.tools.report_style import (
    FONT,
    LIGHT,
    Theme,
    dress,
    headline,
    legend,
    log_x,
    new_figure,
    plain_numbers,
    readable_on,
    row_height,
    share_bar,
)
from megaboat.tools.study_data import Findings, Group, Result, is_sparse
from megaboat.tools.study_fit import Fitted, relative_depth

SLOW_DOWN_RANKS = (2, 8, 64, 512, 4096)
SHARE_TICKS = ([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def study_figures(findings: Findings, laws: dict[str, list[Fitted]], theme: Theme = LIGHT) -> dict[str, Figure]:
    """Those that there is something for, by the name of their file, in the order of the page. `laws`: of the figures
    `bits` and `activation`, best first."""
    sparse = [group for group in findings.groups if is_sparse(group)]
    figures = {}
    if len(findings.groups) > 1:
        figures["quality"] = quality_figure(findings, laws.get("bits", []), theme)
    figures["flops"] = flops_figure(findings, theme)
    if sparse and len(findings.groups) > 1:
        figures["activation"] = activation_figure(findings, laws.get("activation", []), theme)
    if sparse:
        figures["depth"] = depth_figure(findings, sparse, theme)
        figures["domains"] = domain_figure(sparse, theme)
        figures["steps"] = step_figure(findings, sparse, theme)
        figures["layers"] = layer_figure(sparse, theme)
    if any(len(findings.rates(group.levels)) > 1 for group in findings.groups):
        figures["rates"] = rate_figure(findings, theme)
    if sparse:
        figures["span"] = span_figure(findings, sparse, theme)
        figures["dead"] = dead_figure(findings, sparse, theme)
        figures["balance"] = balance_figure(findings, sparse, theme)
    return figures


def colors(findings: Findings, theme: Theme) -> dict[str, Any]:
    """A colour for each group: a ramp where they are ordered, else colours that differ."""
    names = [group.name for group in findings.groups]
    apart = [theme.model, theme.heldout, *theme.baselines]
    if not findings.is_numeric and len(names) <= len(apart):
        return dict(zip(names, apart, strict=False))
    ramp = theme.colormap()
    return {name: ramp(0.3 + 0.7 * i / max(1, len(names) - 1)) for i, name in enumerate(names)}


def quality_figure(findings: Findings, laws: list[Fitted], theme: Theme) -> Figure:
    """Bits per byte by the main axis, with the law that foretold the largest size best."""
    figure = new_figure(theme, 4.0)
    axes = figure.subplots()
    headline(figure, theme, "Bits per byte on held-out text")
    dress(axes, theme, "", axis_label(findings), "bits per byte (lower is better)")
    _draw_law(axes, findings, laws, theme)
    _draw_groups(axes, findings, lambda result: result.bits, theme)
    _main_axis(axes, findings)
    legend(axes, theme)
    return figure


def activation_figure(findings: Findings, laws: list[Fitted], theme: Theme) -> Figure:
    """Mean activation by the main axis, the same way."""
    figure = new_figure(theme, 4.0)
    axes = figure.subplots()
    headline(figure, theme, "Tokens that run attention, mean of all layers")
    dress(axes, theme, "", axis_label(findings), "active tokens, held-out text")
    _draw_law(axes, findings, laws, theme)
    _draw_groups(axes, findings, lambda result: result.activation, theme)
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks(*SHARE_TICKS)
    _main_axis(axes, findings)
    legend(axes, theme)
    return figure


def flops_figure(findings: Findings, theme: Theme) -> Figure:
    """Every run: bits per byte against what its training realised."""
    figure = new_figure(theme, 4.2)
    axes = figure.subplots()
    headline(figure, theme, "Quality against realised arithmetic")
    dress(axes, theme, "", "FLOPs of the training, as activated (log scale)", "bits per byte (lower is better)")
    palette = colors(findings, theme)
    chosen = {result.cell.name for group in findings.groups for result in group.results}
    others = [result for result in findings.results if result.cell.name not in chosen]
    if others:
        place = [r.flops for r in others], [r.bits for r in others]
        axes.scatter(*place, s=22, facecolor="none", edgecolor=theme.muted, label="other learning rates")
    for group in findings.groups:
        place = [r.flops for r in group.results], [r.bits for r in group.results]
        axes.scatter(*place, s=48, color=palette[group.name], edgecolor=theme.paper, label=group.name, zorder=4)
    log_x(axes)
    legend(axes, theme)
    return figure


def depth_figure(findings: Findings, groups: list[Group], theme: Theme) -> Figure:
    """Activation by relative depth, a line a group, its seeds as a band."""
    figure = new_figure(theme, 4.2)
    axes = figure.subplots()
    headline(figure, theme, "Activation by depth")
    dress(
        axes, theme, "", "relative depth (0: next to the input, 1: next to the output)", "active tokens, held-out text"
    )
    palette = colors(findings, theme)
    for group in groups:
        table_WL = np.array([result.activation_by_layer for result in group.results])
        depth_L = relative_depth(table_WL.shape[1])
        color = palette[group.name]
        axes.fill_between(depth_L, table_WL.min(0), table_WL.max(0), color=color, alpha=0.15, linewidth=0)
        axes.plot(depth_L, table_WL.mean(0), color=color, marker="o", markersize=4, linewidth=1.8, label=group.name)
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks(*SHARE_TICKS)
    legend(axes, theme, ncols=2)
    return figure


def domain_figure(groups: list[Group], theme: Theme) -> Figure:
    """Heatmap of group x domain, mean over layers and seeds."""
    domains = list(dict.fromkeys(name for group in groups for result in group.results for name in result.domains))
    table_GD = np.array([[_of_domain(group, domain) for domain in domains] for group in groups])
    order = np.argsort(-np.nan_to_num(table_GD).mean(0))
    domains, table_DG = [domains[i] for i in order], table_GD[:, order].T
    figure = new_figure(theme, 1.9 + row_height(len(domains)) * len(domains))
    axes = figure.subplots()
    headline(figure, theme, "Activation by kind of text")
    dress(axes, theme, "", "", grid=False)
    shades = theme.colormap()
    image = axes.imshow(table_DG, aspect="auto", cmap=shades, vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(domains)), domains, color=theme.ink, fontsize=FONT - 1)
    axes.set_xticks(range(len(groups)), [group.name for group in groups], color=theme.ink, fontsize=FONT - 1)
    if len(groups) > 4:
        axes.tick_params(axis="x", rotation=30)
    axes.set_ylabel("held-out text", color=theme.ink, fontsize=FONT)
    axes.set_xlabel(", ".join(groups[0].levels), color=theme.ink, fontsize=FONT)
    if len(groups) <= 12:
        for (row, column), value in np.ndenumerate(table_DG):
            text = f"{100 * value:.0f}" if math.isfinite(value) else ""
            axes.text(column, row, text, color=readable_on(shades(value)), ha="center", va="center", fontsize=FONT - 1)
    share_bar(figure, image, axes, theme, "active tokens")
    return figure


def step_figure(findings: Findings, groups: list[Group], theme: Theme) -> Figure:
    """Mean activation while it trains, over tokens on a log scale."""
    figure = new_figure(theme, 4.2)
    axes = figure.subplots()
    headline(figure, theme, "Activation while it trains")
    dress(axes, theme, "", "tokens trained on (log scale)", "active tokens, training batches")
    palette = colors(findings, theme)
    for group in groups:
        curves = [_curve(result) for result in group.results]
        tokens_S = curves[0][0]
        table_WS = np.array([np.interp(tokens_S, tokens, share) for tokens, share in curves])
        color = palette[group.name]
        axes.fill_between(tokens_S, table_WS.min(0), table_WS.max(0), color=color, alpha=0.15, linewidth=0)
        axes.plot(tokens_S, table_WS.mean(0), color=color, linewidth=1.7, label=group.name)
    log_x(axes)
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks(*SHARE_TICKS)
    legend(axes, theme, ncols=2)
    return figure


def layer_figure(groups: list[Group], theme: Theme) -> Figure:
    """Heatmaps of relative depth x step, one a group, of its first seed: small multiples."""
    shown = groups if len(groups) <= 6 else [groups[round(i * (len(groups) - 1) / 5)] for i in range(6)]
    rows = -(-len(shown) // 2)
    figure = new_figure(theme, 1.0 + 1.9 * rows)
    panels = figure.subplots(rows, 2, squeeze=False).flatten()
    headline(figure, theme, "Every layer while it trains")
    for axes, group in zip(panels, shown, strict=False):
        metrics = group.results[0].run.metrics
        layers = metrics.activation_SL.shape[1]
        dress(axes, theme, group.name, "training step", "layer", grid=False)
        edges = np.append(metrics.step - 0.5, metrics.step[-1] + 0.5)
        borders = np.arange(layers + 1) - 0.5
        image = axes.pcolormesh(edges, borders, metrics.activation_SL.T, cmap=theme.colormap(), vmin=0, vmax=1)
        axes.yaxis.get_major_locator().set_params(integer=True, nbins=5)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=4)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=list(panels), fraction=0.04, pad=0.02, ticks=SHARE_TICKS[0])
    bar.ax.set_yticklabels(SHARE_TICKS[1])
    bar.ax.tick_params(colors=theme.muted, labelsize=FONT - 1, length=0)
    bar.outline.set_visible(False)
    bar.set_label("active tokens", color=theme.ink, fontsize=FONT)
    return figure


def rate_figure(findings: Findings, theme: Theme) -> Figure:
    """Quality and activation by learning rate: the choice that everything else rests on."""
    figure = new_figure(theme, 5.4)
    top, bottom = figure.subplots(2, 1, sharex=True)
    headline(figure, theme, "The learning rate decides")
    dress(top, theme, "", "", "bits per byte")
    dress(bottom, theme, "", "learning rate (log scale)", "active tokens")
    palette = colors(findings, theme)
    for group in findings.groups:
        by_rate = findings.rates(group.levels)
        color = palette[group.name]
        for axes, figure_of in ((top, lambda r: r.bits), (bottom, lambda r: r.activation)):
            means = [float(np.mean([figure_of(result) for result in its])) for its in by_rate.values()]
            axes.plot(list(by_rate), means, color=color, marker="o", markersize=4, linewidth=1.6, label=group.name)
            axes.scatter([group.rate], [means[list(by_rate).index(group.rate)]], s=90, color=color, zorder=4)
    rates = sorted({rate for group in findings.groups for rate in findings.rates(group.levels)})
    bottom.set_xscale("log")
    bottom.minorticks_off()
    bottom.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=0 if len(rates) < 7 else 45)
    bottom.set_ylim(-0.02, 1.02)
    bottom.set_yticks(*SHARE_TICKS)
    legend(top, theme, ncols=2)
    return figure


def span_figure(findings: Findings, groups: list[Group], theme: Theme) -> Figure:
    """How far back attention reaches: by depth, and by the main axis."""
    figure = new_figure(theme, 6.4)
    top, bottom = figure.subplots(2, 1)
    headline(figure, theme, "Span: tokens back to the oldest key")
    dress(top, theme, "", axis_label(findings), "tokens, mean of layers")
    dress(bottom, theme, "", "relative depth (0: next to the input)", "tokens")
    _draw_groups(top, findings, lambda result: result.span, theme)
    windows = [result.cell.config.model.window for group in groups for result in group.results]  # type: ignore[union-attr]
    places = [findings.place(group) for group in groups for _ in group.results]
    pairs = sorted(set(zip(places, windows, strict=True)))
    label = "window: the span if every token were active"
    top.plot(*zip(*pairs, strict=True), color=theme.muted, linestyle="--", linewidth=1.3, label=label)
    if len(set(windows)) > 1:
        top.set_yscale("log")
        plain_numbers(top.yaxis)
    else:
        top.set_ylim(bottom=0)
    _main_axis(top, findings)
    legend(top, theme)
    palette = colors(findings, theme)
    for group in groups:
        span_by_layer = group.mean_by_layer(lambda result: result.span_by_layer)
        depth_L = relative_depth(len(span_by_layer))
        bottom.plot(
            depth_L, span_by_layer, color=palette[group.name], marker="o", markersize=4, linewidth=1.6, label=group.name
        )
    bottom.set_ylim(0, 1.4 * bottom.get_ylim()[1])  # room for the legend above the lines
    legend(bottom, theme, ncols=4, loc="upper center")
    return figure


def dead_figure(findings: Findings, groups: list[Group], theme: Theme) -> Figure:
    """Layers below 0.5 % by tokens trained on, mean over seeds."""
    figure = new_figure(theme, 3.4)
    axes = figure.subplots()
    headline(figure, theme, "Dead layers")
    dress(axes, theme, "", "tokens trained on (log scale)", "layers under 0.5 %, of all")
    palette = colors(findings, theme)
    for group in groups:
        metrics = [result.run.metrics for result in group.results]
        shares = [smoothed((m.activation_SL < 0.005).mean(1), smoothing_width(len(m.step))) for m in metrics]
        steps = min(map(len, shares))
        mean_S = np.mean([share[:steps] for share in shares], axis=0)
        axes.plot(metrics[0]["tokens"][:steps], mean_S, color=palette[group.name], linewidth=1.6, label=group.name)
    log_x(axes)
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks(*SHARE_TICKS)
    legend(axes, theme, ncols=2)
    return figure


def balance_figure(findings: Findings, groups: list[Group], theme: Theme) -> Figure:
    """The slow-down that the spread of windows' costs foretells, by ranks, where nobody deals them."""
    figure = new_figure(theme, 3.6)
    axes = figure.subplots()
    headline(figure, theme, "What uneven windows would cost on many ranks")
    dress(axes, theme, "", "ranks that wait for each other (log scale)", "predicted slow-down, unbalanced")
    palette = colors(findings, theme)
    for group in groups:
        cv = group.mean(lambda result: result.cv).mean
        slow = [group.slow_down(ranks) for ranks in SLOW_DOWN_RANKS]
        label = f"{group.name} (CV {cv:.3f})"
        axes.plot(
            SLOW_DOWN_RANKS, slow, color=palette[group.name], marker="o", markersize=4, linewidth=1.6, label=label
        )
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(SLOW_DOWN_RANKS, [f"{ranks:,}" for ranks in SLOW_DOWN_RANKS])
    axes.set_ylim(bottom=1)
    legend(axes, theme)
    return figure


def axis_label(findings: Findings) -> str:
    """What stands from left to right."""
    if findings.is_scaling:
        return "parameters outside the embedding (log scale)"
    return f"{findings.main_axis or ''}{' (log scale)' if findings.is_numeric else ''}"


def _draw_groups(axes: Any, findings: Findings, figure_of: Callable[[Result], float], theme: Theme) -> None:
    """Each run as a small point, each group's mean with its interval; a line for each level of the further factors."""
    lines: dict[str, list[Group]] = {}
    for group in findings.groups:
        further = [level for axis, level in group.levels.items() if axis != findings.main_axis]
        lines.setdefault(", ".join(further), []).append(group)
    shades = [theme.model, theme.heldout, *theme.baselines]
    for i, (name, members) in enumerate(lines.items()):
        color = shades[i % len(shades)]
        place_G = np.array([findings.place(group) for group in members])
        found = [group.mean(figure_of) for group in members]
        mean_G = np.array([interval.mean for interval in found])
        reach = np.array([[i.mean - i.low, i.high - i.mean] for i in found]).T
        label = f"{name + ': ' if name else ''}mean of seeds, 95 % interval"
        style = "o-" if len(lines) > 1 and findings.is_numeric else "o"
        axes.errorbar(
            place_G,
            mean_G,
            np.nan_to_num(reach),
            fmt=style,
            color=color,
            capsize=4,
            markersize=7,
            zorder=4,
            label=label,
        )
        runs = [(findings.place(group), figure_of(result)) for group in members for result in group.results]
        axes.scatter(*zip(*runs, strict=True), s=14, color=color, alpha=0.6, zorder=3)


def _of_domain(group: Group, domain: str) -> float:
    return group.mean(lambda result: result.domains.get(domain, math.nan)).mean


def _draw_law(axes: Any, findings: Findings, laws: list[Fitted], theme: Theme) -> None:
    if not laws:
        return
    best = laws[0]
    sizes = [float(group.parameters) for group in findings.groups]
    x_P = np.geomspace(min(sizes), max(sizes), 100)
    low_P, high_P = best.band(x_P)
    axes.fill_between(x_P, low_P, high_P, color=theme.faint, alpha=0.5, linewidth=0, label="95 % band of the fit")
    label = f"{best.law.name}: {best.law.formula}"
    axes.plot(x_P, best.law.predict(best.coefficients_K, x_P), color=theme.muted, linewidth=1.4, label=label)


def _main_axis(axes: Any, findings: Findings) -> None:
    places = {findings.place(group): group.levels.get(findings.main_axis or "", "") for group in findings.groups}
    if findings.is_numeric:
        axes.set_xscale("log")
        axes.minorticks_off()
    labels = [f"{name}\n{_short(place)}" if findings.is_scaling else name for place, name in places.items()]
    axes.set_xticks(list(places), labels)
    if not findings.is_numeric:
        axes.set_xlim(-0.5, len(places) - 0.5)


def _short(number: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"


def _curve(result: Result) -> tuple[np.ndarray, np.ndarray]:
    metrics = result.run.metrics
    return metrics["tokens"], np.nanmean(metrics.activation_SL, axis=1)
