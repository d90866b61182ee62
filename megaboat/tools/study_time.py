"""What a study says of speed: bits per byte on the way, against tokens and against seconds of training."""

import math
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megaboat.tools.report_page import table_html
from megaboat.tools.report_style import LIGHT, Theme, dress, headline, legend, new_figure
from megaboat.tools.study_data import Findings, Group, Result

SECONDS = (5, 10, 15, 20, 30, 45, 60, 90, 120, 300, 600, 1800, 3600)
POINTS = 100  # of a drawn line

CAPTION = (
    "Lower is better; bands hold all seeds, and a line ends where its training did. Left at equal text, right at equal "
    "time on the device that each run had: steps alone, without starting, compiling and evaluating. Time compares only "
    "where each run had a device to itself."
)


def has_curves(findings: Findings) -> bool:
    """Whether the runs were evaluated on the way often enough to draw it."""
    return all(len(_curve(result)[2]) >= 3 for group in findings.groups for result in group.results)


def time_figure(findings: Findings, palette: dict[str, Any], theme: Theme = LIGHT) -> Figure:
    """Bits per byte against tokens and against seconds, a line a group. Needs `has_curves`."""
    figure = new_figure(theme, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    headline(figure, theme, "Quality for text, and for time")
    dress(left, theme, "", "million tokens trained on", "bits per byte (lower is better)")
    dress(right, theme, "", "seconds of training", "")
    for group in findings.groups:
        curves = [_curve(result) for result in group.results]
        color = palette[group.name]
        for axes, which, scale in ((left, 0, 1e6), (right, 1, 1.0)):
            low, high = max(curve[which][0] for curve in curves), min(curve[which][-1] for curve in curves)
            x_P = np.linspace(low, high, POINTS)
            bits_WP = np.array([np.interp(x_P, curve[which], curve[2]) for curve in curves])
            axes.fill_between(x_P / scale, bits_WP.min(0), bits_WP.max(0), color=color, alpha=0.15, linewidth=0)
            axes.plot(x_P / scale, bits_WP.mean(0), color=color, linewidth=1.7, label=group.name)
    legend(right, theme)
    return figure


def bits_after(group: Group, seconds: float) -> float:
    """Mean over the seeds, linear between evaluations; what a run reached in the end counts from then on. NaN before
    the first evaluation of a run."""
    found = []
    for _, seconds_E, bits_E in map(_curve, group.results):
        found.append(float(np.interp(seconds, seconds_E, bits_E, left=math.nan)))
    return float(np.mean(found))


def moments(findings: Findings) -> list[int]:
    """Seconds at which the groups are compared: up to the end of the slowest."""
    ends = [_curve(result)[1][-1] for group in findings.groups for result in group.results]
    return [moment for moment in SECONDS if moment <= max(ends)]


def time_table(findings: Findings) -> str:
    """Bits per byte of each group after so many seconds."""
    at = moments(findings)
    rows = []
    for group in findings.groups:
        cells = [f"{max(_curve(result)[1][-1] for result in group.results):.0f} s"]
        cells += [_bits(bits_after(group, moment)) for moment in at]
        rows.append(
            f'<tr><th scope="row">{escape(group.name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        )
    what = "Bits per byte after so many seconds of training; a run that had ended keeps what it reached."
    return table_html("At equal time", "At equal time", what, ["", "done after", *(f"{s:,} s" for s in at)], rows)


def time_lines(findings: Findings) -> list[str]:
    """The same for a terminal."""
    width = max(len(group.name) for group in findings.groups)
    at = moments(findings)
    lines = [f"{'bits per byte after':<{width}}" + "".join(f"{f'{moment:,} s':>9}" for moment in at)]
    width = max(width, len("bits per byte after"))
    for group in findings.groups:
        lines.append(f"{group.name:<{width}}" + "".join(f"{_bits(bits_after(group, moment)):>9}" for moment in at))
    return lines if at else []


def _curve(result: Result) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, seconds and bits per byte of each evaluation."""
    metrics = result.run.metrics
    kept = [e for e in result.run.evaluations if math.isfinite(e.overall.bits_per_byte)]
    step_E = np.array([evaluation.step for evaluation in kept], dtype=float)
    bits_E = np.array([evaluation.overall.bits_per_byte for evaluation in kept])
    tokens_E, seconds_E = (np.interp(step_E, metrics.step, y_S) for y_S in (metrics["tokens"], result.seconds))
    return tokens_E, seconds_E, bits_E


def _bits(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"
