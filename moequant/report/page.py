"""A report as one HTML file: no scripts, nothing from the network, nothing beside it.

Owns: filling the template and writing the file. Leaves out: what is in the report (`sections`).
Every string may come from a file by a stranger: jinja2 escapes all but the plots' own SVG, and the
page's Content-Security-Policy allows no script and no request.
"""

from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

import moequant
from moequant.files import replacing
from moequant.report.data import ReportData
from moequant.report.sections import absent, sections, summary


def render(data: ReportData) -> str:
    """The page. The same data gives the same page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = resources.files("moequant.report")
    template = environment.from_string((folder / "page.html.jinja").read_text("utf-8"))
    return template.render(
        title=data.title,
        summary=summary(data),
        notes=data.notes,
        sections=sections(data),
        absent=absent(data),
        version=moequant.__version__,
    )


def write_report(path: Path, data: ReportData) -> None:
    """Write the report, all of it or nothing; raises ExportError."""
    page = render(data).encode("utf-8", "replace")  # JSON may hold halves of surrogate pairs
    with replacing(path) as temporary:
        temporary.write_bytes(page)
