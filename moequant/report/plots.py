"""The plots of a report, each a matplotlib figure drawn into inline SVG.

Owns: how each is drawn. Leaves out: the numbers (`data`), where it stands (`sections`). A plot
that can be squeezed is drawn twice, for a phone and for a wide window, with letters of one size;
a heat map has cells of a fixed size and scrolls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)

from moequant.report.evaluation import Histogram, LayerError
from moequant.report.model_file import Grid
from moequant.report.routing import Ablation
from moequant.report.svg import FONT_SIZE, SERIES, TEXT, drawing, new_figure, place, to_svg
from moequant.tables.common import size as byte_size

WIDE, NARROW = 720, 340  # CSS pixels
COLORMAP = "viridis"  # perceptually uniform, and no end of it vanishes in light or dark
LETTER = 6.6  # px, width of an average letter at FONT_SIZE
LONGEST_LABEL = 28  # letters of a name beside a plot
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")  # powers of ten without TeX
LOG = " (log scale)"
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")
MOST_BITS = 16.0  # F16, F32 and the like share the brightest colour
HEAT_WIDTH, HEAT_HEIGHT = 930, 720  # px that a big heat map takes, letters at its left included


@dataclass(frozen=True)
class Plot:
    """One plot: `wide`, and `narrow` where it is drawn for phones too."""

    wide: Markup
    narrow: Markup | None = None


def both(draw: Callable[[float], Figure], label: str) -> Plot:
    """`draw(width)` for a wide window and for a phone."""
    with drawing():
        return Plot(to_svg(draw(WIDE), label), to_svg(draw(NARROW), label))


def heat_map(
    grid: Grid, label: str, *, rows: str, columns: str, scale: str, norm: Normalize | None = None
) -> Plot:
    """`grid` as coloured cells with a scale above; empty cells show the page.

    `rows`, `columns`: what the axes are called. `scale`: what the colours mean. Values past the
    end of `norm` share its last colour, which the scale then says. The cells are one
    small image inside the SVG: 128 x 60 of them take a few kB.
    """
    names = [_short(name) for name in grid.rows]
    left = LETTER * max(len(name) for name in names) + 30
    cell_width = _cell(len(grid.columns), HEAT_WIDTH - left, 6.5, 32)
    cell_height = _cell(len(names), HEAT_HEIGHT, 11, 22)
    width, height = cell_width * len(grid.columns), cell_height * len(names)
    with drawing():
        figure = new_figure(left + max(width, 200) + 24, height + 106)
        axes = place(figure, left, 56, width, height)
        finite = grid.values[np.isfinite(grid.values)]
        norm = norm or Normalize(float(finite.min()), float(finite.max()))
        axes.imshow(
            np.ma.masked_invalid(grid.values), COLORMAP, norm, aspect="auto", interpolation="none"
        )
        _label_cells(axes, names, grid.columns, (cell_width, cell_height))
        axes.set_xlabel(columns, loc="left")
        axes.set_ylabel(rows)
        _scale(place(figure, left, 22, 200, 10), norm, scale, float(finite.max()))
        return Plot(to_svg(figure, label))


def size_bars(sizes: Sequence[tuple[str, int]], label: str) -> Plot:
    """Bytes by name as horizontal bars, with the value beside each."""
    nbytes = [size for _, size in sizes]

    def draw(width: float) -> Figure:
        shown = [_short(name, 24) for name, _ in sizes]
        left = LETTER * max(len(name) for name in shown) + 14
        figure = new_figure(width, 22 * len(shown) + 12)
        axes = place(figure, left, 4, width - left - 70, 22 * len(shown))
        axes.barh(range(len(shown)), nbytes, height=0.7, color=SERIES[0])
        axes.set_yticks(range(len(shown)), shown)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(0, max(nbytes) or 1)
        for row, value in enumerate(nbytes):
            axes.annotate(
                byte_size(value), (value, row), (5, 0), textcoords="offset points", va="center",
                annotation_clip=False,
            )  # fmt: skip
        axes.xaxis.set_visible(False)
        axes.tick_params(length=0, labelcolor=TEXT)
        axes.spines[:].set_visible(False)
        return figure

    return both(draw, label)


def layer_errors(models: Sequence[tuple[str, Sequence[LayerError]]], label: str) -> Plot:
    """NMSE of the hidden states by layer: errors that add up, and each layer's own."""

    def draw(width: float) -> Figure:
        axes = _frame(width, 260, legend=min(len(models), 3) + 1)
        for color, (name, layers) in zip(SERIES[1:], models[:3], strict=False):
            _line(axes, layers, [layer.hidden_nmse for layer in layers], color, _short(name))
        first = models[0][1]
        if any(layer.own_nmse is not None for layer in first):
            own = [layer.own_nmse for layer in first]
            _line(axes, first, own, SERIES[0], "each layer alone", "--")
        axes.set_ylabel("NMSE of hidden states")
        _log_where_positive(axes)
        return _finish(axes)

    return both(draw, label)


def router_overlap(layers: Sequence[LayerError], label: str) -> Plot:
    """Share of routed experts that file and reference both choose, by layer."""

    def draw(width: float) -> Figure:
        axes = _frame(width, 200, legend=0)
        overlap = [layer.router_overlap for layer in layers]
        _line(axes, layers, overlap, SERIES[0], "")
        floor = overlap_floor(min(value for value in overlap if value is not None))
        axes.set_ylim(floor, 1 + (1 - floor) / 50)
        axes.yaxis.set_major_formatter(PERCENT)
        cut = f" (axis from {floor:.0%})" if floor else ""
        axes.set_ylabel(f"overlap{cut}")
        return _finish(axes)

    return both(draw, label)


def kld_distribution(histogram: Histogram, marks: dict[str, float], label: str) -> Plot:
    """Share of scored tokens by KLD, with lines at `marks` (name → nats)."""

    def draw(width: float) -> Figure:
        axes = _frame(width, 260, legend=0, above=32)
        share = np.array(histogram.counts) / max(1, sum(histogram.counts))
        edges = np.array(histogram.edges)
        if edges[0] > 0:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=8 if width > NARROW else 5))
            axes.xaxis.set_major_formatter(PLAIN)
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(f"KLD in nats{LOG}")
        else:
            axes.set_xlabel("KLD in nats")
        axes.stairs(share, edges, fill=True, color=SERIES[0], alpha=0.75, linewidth=0)
        axes.set_xlim(*_filled(edges, share))
        low, high = axes.get_xlim()
        for number, (name, value) in enumerate(marks.items()):
            if low <= value <= high:
                axes.axvline(value, color=SERIES[1], linewidth=1.2)
                axes.annotate(  # two levels, so that neighbours do not touch
                    name, (value, 1), (0, 3 + 13 * (number % 2)),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points", ha="center", color=TEXT,
                )  # fmt: skip
        axes.yaxis.set_major_formatter(PERCENT)
        axes.set_ylabel("scored tokens")
        return _finish(axes, layers=False)

    return both(draw, label)


def ablation(rows: Sequence[Ablation], label: str) -> Plot:
    """Perplexity by how many experts take part, with standard errors."""

    def draw(width: float) -> Figure:
        axes = _frame(width, 220, legend=0)
        positions = range(len(rows))
        axes.errorbar(
            positions, [row.ppl or np.nan for row in rows], [row.stderr or 0 for row in rows],
            color=SERIES[0], marker="o", capsize=3,
        )  # fmt: skip
        names = [_short(row.name, 14 if width > NARROW else 8) for row in rows]
        axes.set_xticks(positions, names, rotation=0 if len(rows) * 60 < width else 45,
                        ha="center" if len(rows) * 60 < width else "right")  # fmt: skip
        axes.set_ylabel("perplexity")
        return _finish(axes, layers=False)

    return both(draw, label)


def overlap_floor(least: float) -> float:
    """Where the axis of an overlap begins: a few points must not look like a collapse."""
    return max(floor for floor in (0.0, 0.5, 0.8) if floor <= max(0.0, least))


def relative_norm(values: npt.NDArray[np.float64]) -> Normalize:
    """Colours for shares relative to an even share of 1: from 0 to 2, or to the most."""
    return Normalize(0, max(2.0, float(np.nanpercentile(values, 99.5))))


def bits_norm(values: npt.NDArray[np.float64]) -> Normalize:
    """Logarithmic colours for bits per weight, up to MOST_BITS."""
    low = float(np.nanmin(values))
    return LogNorm(low, max(low, min(MOST_BITS, float(np.nanmax(values)))))


def _frame(width: float, height: float, *, legend: int, above: float = 6) -> Axes:
    """Axes with room for labels at the left and below, and for `legend` lines above."""
    above += 20 * legend
    figure = new_figure(width, height + above + 44)
    axes = place(figure, 70, above, width - 70 - 12, height)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _finish(axes: Axes, *, layers: bool = True) -> Figure:
    """The axes' figure, with whole numbers of layers below and a legend above."""
    if layers:
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    handles, names = axes.get_legend_handles_labels()
    if names and axes.get_lines():
        axes.legend(handles, names, loc="lower left", bbox_to_anchor=(-0.02, 1.0),
                    borderaxespad=0.1, labelspacing=0.3, handlelength=1.6)  # fmt: skip
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def _line(
    axes: Axes, layers: Sequence[LayerError], values: Sequence[float | None], color: str,
    name: str, style: str = "-",
) -> None:  # fmt: skip
    marker = "o" if len(layers) <= 16 else None
    drawn = [np.nan if value is None else value for value in values]
    axes.plot(
        [layer.layer for layer in layers], drawn, style, color=color, marker=marker,
        markersize=4, label=name or None,
    )  # fmt: skip


def _log_where_positive(axes: Axes) -> None:
    """A logarithmic scale, and the label says so, if every value drawn is positive."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.get_lines()])
    drawn = drawn[np.isfinite(drawn)]
    if drawn.size and (drawn > 0).all():
        axes.set_yscale("log")
        axes.set_ylabel(f"{axes.get_ylabel()}{LOG}")
        axes.yaxis.set_major_formatter(PLAIN)
        axes.yaxis.set_minor_formatter(NullFormatter())


def _filled(edges: npt.NDArray[np.float64], share: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The part of the edges that holds tokens."""
    held = np.flatnonzero(share)
    if not held.size:
        return float(edges[0]), float(edges[-1])
    return float(edges[held[0]]), float(edges[held[-1] + 1])


def _cell(count: int, total: float, least: float, most: float) -> float:
    """Size of a cell so that `count` share `total` px; past 600 cells, whatever the page bears."""
    return min(max(total / count, least), most, max(1.0, 6000 / count))


def _label_cells(
    axes: Axes, rows: Sequence[str], columns: Sequence[str], cell: tuple[float, float]
) -> None:
    """Names along both axes, as many as can be read."""
    step_x = _step(LETTER * (max(len(name) for name in columns) + 1.5) / cell[0])
    step_y = _step((FONT_SIZE + 2) / cell[1])
    axes.set_xticks(range(0, len(columns), step_x), columns[::step_x])
    axes.set_yticks(range(0, len(rows), step_y), rows[::step_y])
    axes.tick_params(length=2)
    axes.spines[:].set_linewidth(0.6)


def _step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20 … that is `least` or more, 4 and 8 for twos' sake."""
    for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        if step >= least:
            return step
    return 1024


def _scale(axes: Axes, norm: Normalize, name: str, largest: float) -> None:
    """A horizontal bar of the colours from least to most, with its name above.

    `largest`: of the values shown; "≥" stands at the end if some lie past it.
    """
    axes.imshow(np.linspace(0, 1, 256)[None], COLORMAP, aspect="auto", interpolation="none",
                extent=(0, 1, 0, 1))  # fmt: skip
    axes.set_yticks([])
    low, high = float(norm.vmin or 0), float(norm.vmax or 0)
    middle = float(norm.inverse(0.5)) if high > low else low
    past = "≥ " if largest > high else ""
    axes.set_xticks([0, 0.5, 1], [f"{low:.3g}", f"{middle:.3g}", f"{past}{high:.3g}"])
    if isinstance(norm, LogNorm) and high > low:
        name += LOG
    axes.tick_params(length=2, pad=1)
    axes.set_title(name, loc="left", pad=5)
    axes.spines[:].set_linewidth(0.6)


def _short(name: str, most: int = LONGEST_LABEL) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
