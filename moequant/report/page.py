"""A report as one HTML file: no scripts, nothing from the network, nothing beside it.

Owns: filling the template and writing the file. Leaves out: what is in the report (`sections`).
Every string may come from a file by a stranger: jinja2 escapes all but the plots' own SVG, and the
page's Content-Security-Policy allows no script and no request. Characters that HTML forbids, and
those that turn the direction of what follows, are replaced wherever they come from.
"""

import re
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

import moequant
from moequant.files import replacing
from moequant.report.data import ReportData
from moequant.report.sections import absent, sections, summary

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTROL = r"\0-\x08\x0b-\x1f\x7f-\x9f"  # all but line breaks and tabs
_SURROGATE = r"\ud800-\udfff"  # JSON may hold halves of surrogate pairs
_NO_CHARACTER = r"\ufdd0-\ufdef" + "".join(
    f"\\U{plane:04x}fffe\\U{plane:04x}ffff" for plane in range(17)
)
_DIRECTION = r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # Unicode's Bidi_Control
_NOT_SHOWN = re.compile(f"[{_CONTROL}{_SURROGATE}{_NO_CHARACTER}{_DIRECTION}]")


def render(data: ReportData) -> str:
    """The page. The same data gives the same page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = resources.files("moequant.report")
    template = environment.from_string((folder / "page.html.jinja").read_text("utf-8"))
    page = template.render(
        title=data.title,
        summary=summary(data),
        notes=data.notes,
        sections=sections(data),
        absent=absent(data),
        version=moequant.__version__,
    )
    return _NOT_SHOWN.sub(REPLACEMENT, page)


def write_report(path: Path, data: ReportData) -> None:
    """Write the report, all of it or nothing; raises ExportError."""
    page = render(data).encode("utf-8")
    with replacing(path) as temporary:
        temporary.write_bytes(page)
