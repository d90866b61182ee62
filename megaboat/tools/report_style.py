"""Colours and axes that all pictures share, for light and dark pages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

WIDTH = 7.2  # inches; with this font the labels can still be read on a phone
DPI = 160
FONT = 11


@dataclass(frozen=True)
class Theme:
    """The colours of one page. `ramp` runs from never active to always active, by lightness alone."""

    name: str
    paper: str
    ink: str
    muted: str
    grid: str
    model: str
    heldout: str
    faint: str
    baselines: tuple[str, str, str]
    ramp: tuple[str, ...]
    missing: str

    def colormap(self) -> Any:
        """0..1 to colour; a value that is not known is hatched by `missing`."""
        return LinearSegmentedColormap.from_list(f"activation-{self.name}", self.ramp).with_extremes(bad=self.missing)


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#17212b",
    muted="#5b6672",
    grid="#e4e6e3",
    model="#0b7a75",
    heldout="#c2410c",
    faint="#a9d3cd",
    baselines=("#7a5ea8", "#a8741a", "#6b7280"),
    ramp=("#f4f1e6", "#a6d9c3", "#38a3a5", "#1f6a8c", "#152f57"),
    missing="#d5d5d5",
)
DARK = Theme(
    name="dark",
    paper="#18212b",
    ink="#e8ecef",
    muted="#a3afbb",
    grid="#2c3845",
    model="#4fd1c0",
    heldout="#ff9b63",
    faint="#2b6460",
    baselines=("#c0a5ee", "#e5b95c", "#aab4bf"),
    ramp=("#22303d", "#22607a", "#2f9c95", "#86d3a0", "#f7f3bf"),
    missing="#4a4f57",
)


def new_figure(theme: Theme, height: float) -> Figure:
    """A figure of its own, without pyplot's global state: safe in any thread of a trainer."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, hspace=0)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout=layout, facecolor=theme.paper)
    FigureCanvasAgg(figure)
    return figure


def headline(figure: Figure, theme: Theme, title: str) -> None:
    """The title of the whole picture, from its left edge: long ones keep all of the width."""
    figure.suptitle(title, x=0.02, ha="left", color=theme.ink, fontsize=FONT + 2, fontweight="bold")


def row_height(rows: int) -> float:
    """Inches for a row of a chart: many rows move closer together."""
    return 0.42 if rows <= 8 else 0.3


def dress(axes: Any, theme: Theme, title: str = "", x: str = "", y: str = "", grid: bool = True) -> None:
    """Title on the left, labels, quiet spines and, for lines, a grid."""
    axes.set_facecolor(theme.paper)
    axes.tick_params(colors=theme.muted, labelsize=FONT - 1, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.muted)
    if title:
        axes.set_title(title, loc="left", color=theme.ink, fontsize=FONT + 1, fontweight="bold", pad=9)
    axes.set_xlabel(x, color=theme.ink, fontsize=FONT)
    axes.set_ylabel(y, color=theme.ink, fontsize=FONT)
    if grid:
        axes.grid(True, color=theme.grid, linewidth=0.8)
        axes.set_axisbelow(True)


def count_steps(axes: Any) -> None:
    """Whole steps on the x axis, with separators."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    plain_numbers(axes.xaxis)


def plain_numbers(axis: Any) -> None:
    """12,000 rather than 12000 or 1.2e4; 0.25 as it is."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if abs(value) >= 100 else f"{value:g}"))


def log_y(axes: Any) -> None:
    """A logarithmic y axis with few, plainly written ticks."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    plain_numbers(axes.yaxis)


def log_x(axes: Any) -> None:
    """A logarithmic x axis of large numbers, drawn already: 500 M, 1 G. Where it spans little, ticks at 2 and 5 too."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter())


def legend(parent: Any, theme: Theme, **options: Any) -> None:
    """A legend without a border, in axes or a figure; what lies behind its words is dimmed."""
    parent.legend(
        facecolor=theme.paper, framealpha=0.8, edgecolor="none", fontsize=FONT - 1, labelcolor=theme.ink, **options
    )


def share_bar(figure: Figure, image: Any, axes: Any, theme: Theme, label: str) -> None:
    """The colour scale of a heatmap, 0..1 as percent."""
    tall = 5 * figure.get_figheight()
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=tall, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.ax.set_yticklabels(["0 %", "25 %", "50 %", "75 %", "100 %"])
    bar.ax.tick_params(colors=theme.muted, labelsize=FONT - 1, length=0)
    bar.outline.set_visible(False)
    bar.set_label(label, color=theme.ink, fontsize=FONT)


def layer_ticks(axis: Any, layers: int) -> None:
    """Every layer where there is room, else every second, fourth, ..."""
    stride = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128) if layers / s <= 16 or s == 128)
    axis.set_ticks(range(0, layers, stride))


def readable_on(color: Sequence[float]) -> str:
    """Black or white, whichever can be read on `color` (r, g, b, ...)."""
    red, green, blue = (part**2.2 for part in color[:3])  # screens are not linear
    return "#10202c" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.2 else "#ffffff"
