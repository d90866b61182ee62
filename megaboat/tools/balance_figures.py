"""Pictures of `megaboat balance simulate`."""

from matplotlib.figure import Figure

from megaboat.parallel.balance.simulate import Case, Result
from megaboat.tools.report_style import LIGHT, Theme, dress, headline, legend, new_figure

MARKERS = {"random": "X", "domain": "s", "predicted": "o", "perfect": "^"}


def slow_down_figure(results: dict[Case, Result], theme: Theme = LIGHT) -> Figure:
    """Slow-down against ranks, a panel for each way to meet, a line for each assignment; dashed the rule of thumb."""
    panels = sorted({(case.sync, case.accumulate, case.node) for case in results})
    figure = new_figure(theme, 0.8 + 2.6 * len(panels))
    columns = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    headline(figure, theme, "Slow-down over perfect balance")
    colors = dict(zip(MARKERS, (theme.heldout, theme.baselines[0], theme.model, theme.muted), strict=True))
    for axes, (sync, accumulate, node) in zip(columns, panels, strict=True):
        meet = "every layer" if sync == "layer" else f"ZeRO-{sync}"
        title = f"{meet}, {accumulate} micro-batches a step" + (f", rows shared by {node} ranks" if node else "")
        dress(axes, theme, title, "", "slow-down")
        for name, marker in MARKERS.items():
            mine = [(c, r) for c, r in results.items() if (c.sync, c.accumulate, c.node) == (sync, accumulate, node)]
            points = sorted((c.ranks, r) for c, r in mine if c.assignment == name)
            ranks = [x for x, _ in points]
            axes.plot(ranks, [r.slow_down for _, r in points], marker=marker, color=colors[name], label=name)
            low, high = [r.low for _, r in points], [r.high for _, r in points]
            axes.fill_between(ranks, low, high, color=colors[name], alpha=0.15, linewidth=0)
            if name == "random":
                rule = [r.rule for _, r in points]
                axes.plot(ranks, rule, color=theme.muted, linestyle="--", linewidth=1.2, label="rule of thumb")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=1)
    columns[-1].set_xlabel("ranks")
    columns[-1].set_xticks(ranks, [f"{count:,}" for count in ranks])
    columns[-1].minorticks_off()
    legend(columns[0], theme, loc="upper left")
    return figure
