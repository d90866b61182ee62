"""The report of a study: pictures, tables, fitted laws and what they do not show, as one offline page and CSV."""

import itertools
import math
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from megaboat.errors import BadInput
from megaboat.tools.report_page import figure_html, png, section, table_html, write_html
from megaboat.tools.report_style import DARK, LIGHT, Theme
from megaboat.tools.report_words import percent
from megaboat.tools.study_data import RANKS, WINDOWS_A_MEETING, Findings, Group, is_sparse, read_findings, write_cells
from megaboat.tools.study_figures import colors, study_figures
from megaboat.tools.study_fit import (
    CONSTANT,
    LOG_LINE,
    LOGIT_LINE,
    POWER,
    PURE_POWER,
    Fitted,
    Interval,
    LayerFit,
    fit_laws,
    fit_layers,
)
from megaboat.tools.study_plan import Plan
from megaboat.tools.study_time import CAPTION as TIME_CAPTION
from megaboat.tools.study_time import has_curves, time_figure, time_lines, time_table

PAGE, TABLE = "index.html", "cells.csv"
CAPTIONS = {
    "quality": "Lower is better. Small points are single runs, the large ones their mean over seeds with its 95 % "
    "interval; where intervals overlap, the difference may be chance.",
    "flops": "Each point is a run. Left and low is good: as few bits for as little arithmetic, counted as it was "
    "activated and not as if every token ran attention.",
    "activation": "How many tokens ran attention at the end of the training. If a flat line fits into the band, "
    "these runs show no effect.",
    "depth": "Each line is a group of runs, from the layer next to the input to the one next to the output; its band "
    "holds all seeds. Lines that rise say that higher layers look back more often.",
    "domains": "Read along a row for the effect of the group, down a column for that of the text. Numbers are percent "
    "of tokens, mean of all layers and seeds.",
    "steps": "How the share came about: where a line is flat, it has settled; bands hold all seeds.",
    "layers": "The mean hides what single layers do: in each panel a row is a layer and a column a step of one run. "
    "What stands out from the card is active.",
    "rates": "Each line is a group, the large point the learning rate that was taken for it. A large point at the end "
    "of its line means that the grid was too small. Below: how much of the activation is the rate's doing. The points "
    "are of the seeds that tried all rates.",
    "time": TIME_CAPTION,
    "span": "Above: how far back the oldest token lies that an active token attends to. Points above the dashed line "
    "are what sparsity buys: the same number of keys reaches further. The lower panel shows the same by depth.",
    "dead": "The share of layers in which fewer than one token in 200 runs attention. They save work and learn nothing "
    "more.",
    "balance": "From the spread of the costs of single windows (CV: deviation over mean): how much longer a step would "
    f"take where nobody deals the windows, with {WINDOWS_A_MEETING} windows a rank between two meetings. 1 is no loss.",
}
ABOUT = (
    "Each <em>cell</em> of this study is one training run; cells differ in what the study varies and in their seed. "
    "In each layer of a SeqBoat a learned switch decides, token by token, whether attention runs; the share of such "
    "tokens is the layer's <strong>activation</strong>. "
)
TUNED = {
    "all_seeds": "Of the learning rates that were tried, each group is shown at the one with the fewest bits per byte "
    "on held-out text, since the rate moves the activation as much as anything.",
    "first_seed": "Each group is shown at the learning rate at which its first seed had the fewest bits per byte on "
    "held-out text, since the rate moves the activation as much as anything: that seed alone tried all rates, and the "
    "others ran at its best one.",
}
LIMITS = (
    "Intervals are over seeds alone (initial weights and order of the data): another corpus, tokenizer, row length or "
    "schedule is not in them.",
    "A fitted law holds between the sizes that were run. The error at the size left out is the only evidence here of "
    "how far it may be drawn out.",
)
CHOSE = "The held-out text chose the learning rate too, so its bits per byte are a little too good for all groups alike"
TESTED = f"{CHOSE}; the text of the column `on test text` chose nothing."


def write_study_report(plan: Plan, folder: Path) -> list[str]:
    """Page, pictures and CSV into `folder`; lines for the terminal. Raises BadInput where no cell is done."""
    findings = read_findings(plan)
    laws, layers = fit_all(findings)
    light, dark = (_figures(findings, laws, theme) for theme in (LIGHT, DARK))
    images = {name: figure_html(name, light[name], dark[name], _told(findings, name), CAPTIONS[name]) for name in light}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in light.items():
            (folder / f"{name}.png").write_bytes(png(figure))
        write_cells(findings, folder / TABLE)
        write_html(
            folder / PAGE,
            kicker="A megaboat study",
            title=f"{plan.study.out.resolve().name}: a megaboat study",
            name=plan.study.out.resolve().name,
            verdict=plan.study.question,
            tiles=_tiles(findings, laws),
            status=f"{findings.done} of {findings.wanted} cells are done.",
            sections=_sections(findings, laws, layers, images),
            maker="megaboat study report",
        )
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written: {error.strerror}") from None
    warnings = [f"warning: {note}" for note in _notes(findings)]
    return [*warnings, *_lines(findings, laws), f"report: {folder / PAGE}, figures: {folder / TABLE}"]


def _figures(findings: Findings, laws: dict[str, list[Fitted]], theme: Theme) -> dict[str, Figure]:
    figures = study_figures(findings, laws, theme)
    if has_curves(findings):
        figures["time"] = time_figure(findings, colors(findings, theme), theme)
    return figures


def fit_all(findings: Findings) -> tuple[dict[str, list[Fitted]], list[LayerFit]]:
    """Laws of loss and activation against size, and of activation by layer; nothing where sizes are not compared."""
    groups = [group for group in findings.groups if is_sparse(group)]
    single = len(findings.plan.factors) == 1
    if not (findings.is_scaling and single and len(groups) == len(findings.groups)):
        return {}, []
    sizes = np.array([group.parameters for group in groups], dtype=float)
    bits = [np.array([result.bits for result in group.results]) for group in groups]
    shares = [np.array([result.activation for result in group.results]) for group in groups]
    laws = {
        "bits": fit_laws((CONSTANT, LOG_LINE, PURE_POWER, POWER), sizes, bits),
        "activation": fit_laws((CONSTANT, LOGIT_LINE, POWER), sizes, shares),
    }
    return laws, fit_layers(
        sizes.tolist(), [[result.activation_by_layer for result in group.results] for group in groups]
    )


def _sections(
    findings: Findings, laws: dict[str, list[Fitted]], layers: list[LayerFit], images: dict[str, str]
) -> list[str]:
    chose = TESTED if _is_tested(findings) else f"{CHOSE}."
    notes = "".join(f"<li>{escape(note)}</li>" for note in [*_notes(findings), *LIMITS, chose])
    laid = {
        "What was found": [_table(findings), *_pictures(images, "quality", "flops", "rates")],
        "How fast it was found": [*_pictures(images, "time"), time_table(findings)] if "time" in images else [],
        "Where attention ran": _pictures(images, "activation", "depth", "domains", "steps", "layers"),
        "What follows from it": _pictures(images, "span", "dead", "balance"),
        "Fitted laws": [_laws_table(laws), _layer_table(layers)] if laws else [],
        "What this does not show": [f'<ul class="remarks">{notes}</ul>'],
        "Again": [
            f"<pre>megaboat study run STUDY.yaml\nmegaboat study report STUDY.yaml</pre><p>{TABLE} has all cells.</p>"
        ],
    }
    parts = [section("What am I looking at?", f"<p>{ABOUT}{TUNED[findings.plan.study.tune]}</p>")]
    return parts + [section(title, *content) for title, content in laid.items() if content]


def _pictures(images: dict[str, str], *names: str) -> list[str]:
    return [images[name] for name in names if name in images]


def _notes(findings: Findings) -> list[str]:
    few = [group.name for group in findings.groups if len(group.results) < 2]
    alone = [f"One seed only, so no interval: {', '.join(few)}."] if few else []
    return [*findings.notes, *(note for group in findings.groups for note in group.notes), *alone]


def _table(findings: Findings) -> str:
    tested = ["on test text"] if _is_tested(findings) else []
    head = ["", "runs", "learning rate", "bits per byte", *tested]
    head += ["active", "bottom / middle / top third", "domains, sd"]
    head += ["dead layers", "span", "settled after", "CV", "GFLOP a token", "PFLOP a run"]
    head += [f"slow-down at {ranks:,}" for ranks in RANKS]
    what = "Means over the seeds of each group, with 95 % intervals by Student's t; of training, the last fifth."
    return table_html("Results", "Results", what, head, [_row(group, bool(tested)) for group in findings.groups])


def _is_tested(findings: Findings) -> bool:
    results = itertools.chain.from_iterable(group.results for group in findings.groups)
    return any(math.isfinite(result.test_bits) for result in results)


def _row(group: Group, tested: bool) -> str:
    cells = [str(len(group.results)), f"{group.rate:g}", _interval(group.mean(lambda r: r.bits), "{:.3f}")]
    cells += [_interval(group.mean(lambda r: r.test_bits), "{:.3f}")] if tested else []
    if is_sparse(group):
        spread = group.mean(lambda r: float(np.std(list(r.domains.values()))))
        cells += [
            _interval(group.mean(lambda r: r.activation), "{:.3f}"),
            " / ".join(percent(share) if math.isfinite(share) else "-" for share in group.thirds()),
            f"{spread.mean:.3f}",
            f"{group.mean(lambda r: r.dead).mean:.1f} of {group.layers}",
            _whole(group.mean(lambda r: r.span).mean),
            _share(group.mean(lambda r: r.settled).mean),
            f"{group.mean(lambda r: r.cv).mean:.3f}",
        ]
    else:
        cells += ["-"] * 7
    cells += [
        f"{group.mean(lambda r: r.flops_a_token).mean / 1e9:.3f}",
        f"{group.mean(lambda r: r.flops).mean / 1e15:.2f}",
    ]
    cells += [f"{group.slow_down(ranks):.3f}" if is_sparse(group) else "-" for ranks in RANKS]
    return f'<tr><th scope="row">{escape(group.name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _whole(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "-"


def _share(value: float) -> str:
    return f"{percent(value)} of the run" if math.isfinite(value) else "-"


def _interval(interval: Interval, form: str) -> str:
    if not math.isfinite(interval.mean):
        return "-"
    if not math.isfinite(interval.low):
        return form.format(interval.mean)
    return f"{form.format(interval.mean)} \N{PLUS-MINUS SIGN} {form.format(interval.high - interval.mean)}"


def _laws_table(laws: dict[str, list[Fitted]]) -> str:
    names = {"bits": "bits per byte", "activation": "mean activation"}
    rows = []
    for figure, fits in laws.items():
        for fitted in fits:
            values = zip(fitted.law.coefficients, fitted.intervals, strict=True)
            told = [f"{name} {i.mean:.3g} [{i.low:.3g}, {i.high:.3g}]" for name, i in values]
            error = f"{fitted.held_out_error:.4f}" if math.isfinite(fitted.held_out_error) else "too few sizes"
            cells = f"<td>{escape(fitted.law.formula)}</td><td>{_stacked(told)}</td><td>{error}</td>"
            rows.append(f'<tr><th scope="row">{names[figure]}: {fitted.law.name}</th>{cells}</tr>')
    what = (
        "Best first, by the error at the largest size when fitted to the others; x: parameters outside the embedding. "
        "Brackets hold 95 % of a bootstrap over the seeds of each size."
    )
    return table_html(
        "Laws of size", "Laws of size", what, ("law", "formula", "coefficients", "error at the size left out"), rows
    )


def _layer_table(fits: list[LayerFit]) -> str:
    rows = []
    for fit in fits:
        values = zip(fit.terms, fit.intervals, strict=True)
        told = [f"{name} {i.mean:+.3f} [{i.low:+.3f}, {i.high:+.3f}]" for name, i in values]
        cells = f"<td>{_stacked(told)}</td><td>{fit.held_out_error:.3f}</td>"
        rows.append(f'<tr><th scope="row">{", ".join(fit.terms)}</th>{cells}</tr>')
    what = (
        "Each layer by itself, on the logit scale: depth is from the first layer to the last, size a factor of e in "
        "parameters. The error is the root mean square over the layers of the largest size, fitted to the others."
    )
    return table_html("Layers", "Layers", what, ("terms", "coefficients", "error at the size left out"), rows)


def _stacked(lines: list[str]) -> str:
    return "<br>".join(map(escape, lines))


def _tiles(findings: Findings, laws: dict[str, list[Fitted]]) -> list[tuple[str, str]]:
    best = min(findings.groups, key=lambda group: group.mean(lambda r: r.bits).mean)
    tiles = [(f"{best.mean(lambda r: r.bits).mean:.3f}", f"bits per byte, the fewest: {best.name}")]
    sparse = [group for group in findings.groups if is_sparse(group)]
    if sparse:
        shares = [group.mean(lambda r: r.activation).mean for group in sparse]
        spread = (
            percent(min(shares)) if len(shares) == 1 else f"{100 * min(shares):.0f}\N{EN DASH}{percent(max(shares))}"
        )
        tiles.append((spread, "of tokens run attention, by group"))
    tiles.append((f"{sum(result.cell.tokens for result in findings.results) / 1e6:,.3g} M", "tokens, all cells"))
    tiles.append((f"{sum(result.flops for result in findings.results) / 1e15:.3g}", "PFLOP realised, all cells"))
    if laws:
        best_law = laws["activation"][0]
        how = f"off by the best law of activation ({best_law.law.name}) at the largest size, fitted to the others"
        tiles.append((f"{best_law.held_out_error:.3f}", how))
    return tiles


def _lines(findings: Findings, laws: dict[str, list[Fitted]]) -> list[str]:
    """The table for a terminal."""
    width = max(len(group.name) for group in findings.groups)
    tested = _is_tested(findings)
    test_head = f"{'on test text':>17}" if tested else ""
    lines = [
        f"{'':<{width}}  runs      lr    bits per byte{test_head}           active   dead    span     CV  GFLOP/token"
    ]
    for group in findings.groups:
        bits, active = group.mean(lambda r: r.bits), group.mean(lambda r: r.activation)
        dead, span, cv, flops = (
            group.mean(figure).mean
            for figure in (lambda r: r.dead, lambda r: r.span, lambda r: r.cv, lambda r: r.flops_a_token)
        )
        test = f"{_interval(group.mean(lambda r: r.test_bits), '{:.3f}'):>17}" if tested else ""
        lines.append(
            f"{group.name:<{width}}{len(group.results):>6}{group.rate:>8g}{_interval(bits, '{:.3f}'):>17}{test}"
            f"{_interval(active, '{:.3f}'):>17}{dead:>7.1f}{_whole(span):>8}{cv:>7.3f}{flops / 1e9:>13.4f}"
        )
    if findings.plan.study.tune == "first_seed":
        lines.append("learning rates: the best of the first seed, which alone tried all; the others ran at that one")
    lines += time_lines(findings) if has_curves(findings) else []
    for name, fits in laws.items():
        best = fits[0]
        lines.append(f"{name}: {best.law.formula} foretells the largest size best, off by {best.held_out_error:.4f}")
    return lines


def _told(findings: Findings, name: str) -> str:
    """The numbers of a picture, for those who cannot see it."""
    parts = []
    for group in findings.groups:
        bits, active = group.mean(lambda r: r.bits).mean, group.mean(lambda r: r.activation).mean
        parts.append(
            f"{group.name}: {bits:.3f} bits per byte" + (f", {percent(active)} active" if active == active else "")
        )
    return f"Picture of {name}. {'; '.join(parts)}."
