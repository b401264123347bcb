"""Turns matplotlib figures into inline SVG that follows the page: its fonts, its light or dark.

Owns: sizes, the colours that the page's style sheet defines, what is cut from matplotlib's SVG.
Leaves out: what is drawn (`plots`).

A figure is drawn in stand-in colours, each of which becomes a CSS variable. Text stays text. Two
runs give the same bytes: ids are salted with the figure's label and width, which no other drawing
of a page shares, and no date is written.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Stand-in colour → CSS variable. No colormap holds these: they differ in one blue step each.
TEXT, MUTED, GRID = "#010203", "#010204", "#010205"
SERIES = ("#010206", "#010207", "#010208", "#010209")
VARIABLES = {TEXT: "--text", MUTED: "--muted", GRID: "--grid"} | {
    color: f"--series-{number}" for number, color in enumerate(SERIES, 1)
}
FONT_SIZE = 12  # px, as wide as the SVG is: one unit of its view box is one CSS pixel
UNITS_PER_INCH = 72  # of matplotlib's SVG, whatever the dpi
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold "$"
    "font.size": FONT_SIZE,
    "axes.titlesize": FONT_SIZE,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "axes.edgecolor": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}  # fmt: skip
_PROLOGUE = re.compile(r"^.*?(?=<svg)|<metadata>.*?</metadata>|<style.*?</style>", re.DOTALL)
_FONT = re.compile(r"font-family: [^;\"]*(?:; )?")
_ID = re.compile(r' id="([^"]*)"')
_ROOT = re.compile(r"<svg[^>]*>")
_BREAK_IN_DATA = re.compile(r"(?<=base64,)[^\"]*")


@contextmanager
def drawing() -> Iterator[None]:
    """Everything inside is drawn in the page's stand-in colours and fonts."""
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        # Only the width of such a character is guessed; the browser has a font for it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in CSS pixels."""
    return Figure(figsize=(width / UNITS_PER_INCH, height / UNITS_PER_INCH))


def place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at this place, in CSS pixels from the figure's upper left corner."""
    full = figure.get_size_inches() * UNITS_PER_INCH
    bottom = full[1] - top - height
    return figure.add_axes((left / full[0], bottom / full[1], width / full[0], height / full[1]))


def to_svg(figure: Figure, label: str) -> Markup:
    """The figure as an `<svg>` element for an HTML page, with `label` as its text alternative."""
    written = io.StringIO()
    width, height = figure.get_size_inches() * UNITS_PER_INCH
    with matplotlib.rc_context({"svg.hashsalt": f"{width:.0f} {label}"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    svg = _FONT.sub("", _PROLOGUE.sub("", written.getvalue()))
    svg = _BREAK_IN_DATA.sub(lambda data: data[0].replace("\n", ""), svg)
    svg = _ID.sub(lambda found: found[0] if f"#{found[1]}" in svg else "", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    root = (
        f'<svg role="img" aria-label="{escape(label)}" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">'
    )
    return Markup(_ROOT.sub(lambda _: root, svg, count=1))
