"""The report as one HTML file: no script, no request, light and dark, for someone who has never heard of SeqBoat."""

import base64
import io
import math
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

import numpy as np
import yaml
from matplotlib.figure import Figure

from megaboat import __version__
from megaboat.tools import report_balance
from megaboat.tools import report_words as words
from megaboat.tools.report_data import BASELINES, Evaluation, Run, Score
from megaboat.tools.report_figures import ALL_TEXT, BASELINE_NAMES

TEMPLATE = Path(__file__).with_name("report_page.html")

WHAT_SPARSE = (
    "A language model reads text and, at every token (a word or a piece of one), guesses the next. To guess well it "
    "has to look back: the usual way, <em>attention</em>, looks back from every token, in every layer, and that is "
    "what makes long texts expensive.",
    "The model of this run is a <strong>SeqBoat</strong>. In each layer a cheap running summary carries the past along "
    "for every token, and a small learned switch decides, token by token, whether looking back is worth it as well. "
    "Where the switch is on, the token is <em>active</em>: attention runs for it, among the other active tokens. The "
    "share of active tokens is the layer's <strong>activation</strong>: 0 % would be a layer that never looks back, "
    "100 % one that always does. Nobody told the model which tokens deserve it; the pictures below show what it chose.",
)
WHAT_DENSE = (
    "A language model reads text and, at every token (a word or a piece of one), guesses the next. The model of this "
    "run is a dense one: attention, its way of looking back, runs for every token in every layer. It is the yardstick "
    "for the sparse models that megaboat trains, so there is no activation to show here.",
)
WHAT_BITS = (
    "Bits per byte: how many bits each byte of text would take if the model's guesses were used to compress it. The "
    "better the guesses, the fewer. Beside it, three simpler ways: a <em>token unigram</em> knows only how "
    "frequent each token is, a <em>token bigram</em> which token follows which, and <em>zlib&nbsp;-9</em> is the "
    "compressor inside zip files at its strongest."
)
LOSS_ALONE = "How surprised the model is by the next token of the text it trains on. It should fall."
CAPTIONS = {
    "bits_per_byte": "Each row is a kind of text, each mark one way of predicting it, and further left is better. The "
    "number is this model's. Text as it lies on a disk takes 8 bits per byte.",
    "loss": "How surprised the model is by the next token, on the text it trains on (line) and on text kept away from "
    "it (dots). Both should fall. Dots that rise while the line still falls mean that it learns by heart.",
    "activation_by_step": "Read it from left to right: each row is a layer, each column a moment of the training, and "
    "the stronger a colour stands out from the card, the more tokens looked back there. The line on top is the mean "
    "of all layers. Plain grey would be a step that was not recorded.",
    "activation_by_domain": "The same switches at the end of the training, on held-out text, by kind of text. "
    "Differences down a column are differences in what the text needs; differences along a row are the division of "
    "labour between layers.",
    "schedule": "How large the steps were (learning rate) and how strongly the text pulled (gradient norm). Single "
    "spikes are normal; a norm that climbs and stays up is not.",
    "throughput": "Tokens per second, step by step. Dips are saving, evaluation, or a neighbour on the same machine.",
}


def write_page(run: Run, light: dict[str, Figure], dark: dict[str, Figure], file: Path) -> None:
    """Put the pictures in both themes, the table and the words into `file`."""
    alternatives = words.describe_pictures(run)
    captions = CAPTIONS | report_balance.CAPTIONS
    captions = captions if run.evaluations else {**captions, "loss": LOSS_ALONE}
    images = {name: figure_html(name, light[name], dark[name], alternatives[name], captions[name]) for name in light}
    write_html(
        file,
        kicker="A megaboat training run",
        title=f"{run.name}: a megaboat run",
        name=run.name,
        verdict=words.verdict(run),
        tiles=_tiles(run),
        status=words.status(run),
        sections=_sections(run, images),
        maker="megaboat report",
    )


def write_html(file: Path, tiles: list[tuple[str, str]], sections: list[str], **texts: str) -> None:
    """Fill the template: `texts` are escaped, `sections` are HTML, a tile is a value and what it means."""
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        {name: escape(text) for name, text in texts.items()},
        tiles="\n".join(f"<li><b>{escape(value)}</b><span>{escape(label)}</span></li>" for value, label in tiles),
        sections="\n".join(sections),
        version=escape(__version__),
    )
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(file)


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _sections(run: Run, images: dict[str, str]) -> list[str]:
    what = WHAT_SPARSE if run.is_sparse else WHAT_DENSE
    sections = [section("What am I looking at?", *[f"<p>{text}</p>" for text in what])]
    last = run.last_evaluation
    quality = [_table(run, last)] if last is not None else ["<p>No evaluation yet.</p>"]
    sections.append(section("How well does it predict?", *quality, images.get("bits_per_byte", ""), images["loss"]))
    pictures = ("activation_by_step", "activation_by_domain", "inside_the_switches")
    decisions = [images[name] for name in pictures if name in images]
    if decisions:
        sections.append(section("Where did it look back?", *decisions))
    told = "".join(f"<li>{escape(remark[:1].upper() + remark[1:])}</li>" for remark in words.remarks(run))
    sections.append(section("Honest remarks", f'<ul class="remarks">{told}</ul>'))
    sections.append(section("How did the training go?", images["schedule"], images["throughput"]))
    if "balance" in images:
        sections.append(section("Was the work shared evenly?", images["balance"]))
    sections.append(section("Go on from here", _next_steps(run), _config(run)))
    return sections


def section(title: str, *parts: str) -> str:
    """Parts of HTML under a heading."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def _tiles(run: Run) -> list[tuple[str, str]]:
    metrics, last = run.metrics, run.last_evaluation
    tiles = []
    if last is not None and math.isfinite(last.overall.bits_per_byte):
        tiles.append((f"{last.overall.bits_per_byte:.2f}", "bits per byte on held-out text (lower is better)"))
    elif metrics.known("loss"):
        loss = metrics["loss"][np.isfinite(metrics["loss"])]
        tiles.append((f"{loss[-1]:.2f}", "last training loss, nats per token"))
    better = words.gain(run, "unigram")
    if math.isfinite(better):
        tiles.append((f"{-100 * better:+.0f} %".replace("-", "\N{MINUS SIGN}"), "bits, against a token unigram model"))
    if run.is_sparse:
        tiles.append((words.percent(words.mean_activation(run)), "of tokens look back, mean of all layers"))
    if metrics.known("tokens"):
        tiles.append((_short(float(np.nanmax(metrics["tokens"]))), f"tokens read in {metrics.step[-1]:,} steps"))
    if metrics.known("step_time"):
        speed = f"{np.nanmedian(metrics['tokens_per_second']):,.0f} tokens per second"
        tiles.append((_duration(float(np.nansum(metrics["step_time"]))), f"in training steps, {speed}"))
    return tiles


def _short(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _table(run: Run, last: Evaluation) -> str:
    beside = [name for name in BASELINES if name in run.baselines]
    head = ["text", "this model", *[BASELINE_NAMES[name] for name in beside], "held-out kB"]
    head += ["active"] if run.is_sparse else []
    rows = [_row(run, ALL_TEXT, last.overall, beside)]
    rows += [_row(run, name, last.domains[name], beside) for name in sorted(last.domains)]
    caption = f"Bits per byte on held-out text ({escape(last.split)}), step {last.step:,}"
    return table_html("Bits per byte", caption, WHAT_BITS, head, rows)


def table_html(label: str, caption: str, what: str, head: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls by itself; `label` names it to screen readers. All but `head` are HTML already."""
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return (
        f'<p>{what}</p>\n<div class="scroll" role="region" aria-label="{label}" tabindex="0">\n'
        f"<table>\n<caption>{caption}</caption>\n<thead><tr>{cells}</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _row(run: Run, name: str, score: Score, beside: list[str]) -> str:
    key = "overall" if name == ALL_TEXT else name
    bits = [score.bits_per_byte, *[run.baselines[baseline].get(key, math.nan) for baseline in beside]]
    best = min((value for value in bits if math.isfinite(value)), default=math.nan)
    cells = [
        f"<td{' class=' + chr(34) + 'best' + chr(34) if value == best else ''}>{_bits(value)}</td>" for value in bits
    ]
    cells.append(f"<td>{score.bytes / 1000:,.0f}</td>" if score.bytes else "<td>not said</td>")
    if run.is_sparse:
        cells.append(f"<td>{words.percent(float(np.mean(score.activation))) if score.activation else 'not said'}</td>")
    style = ' class="all"' if name == ALL_TEXT else ""
    return f'<tr{style}><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'


def _bits(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not measured"


def figure_html(name: str, light: Figure, dark: Figure, alternative: str, caption: str) -> str:
    """The picture in both themes, with what it shows for those who cannot see it, and its caption."""
    bright = png(light)
    width, height = (int.from_bytes(bright[place : place + 4], "big") for place in (16, 20))
    return (
        f'<figure id="{name}"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{_inline(png(dark))}">'
        f'<img src="{_inline(bright)}" width="{width}" height="{height}" alt="{escape(alternative)}">'
        f"</picture><figcaption>{escape(caption)}</figcaption></figure>"
    )


def _inline(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def _next_steps(run: Run) -> str:
    folder = escape(shlex.quote(str(run.folder)))
    commands = (
        f"# let it write\nmegaboat generate {folder} --prompt 'def '\n\n"
        f"# the same curves, live\ntensorboard --logdir {folder}/tensorboard\n\n"
        f"# for transformers, with torch alone\nmegaboat convert to-hf {folder} --out export"
    )
    return f"<pre>{commands}</pre>"


def _config(run: Run) -> str:
    if not run.config:
        return '<p class="quiet">The run folder holds no config.yaml.</p>'
    text = escape(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
    return f"<details><summary>Every setting of this run</summary><pre>{text}</pre></details>"
