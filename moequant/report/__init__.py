"""One self-contained HTML page about a GGUF file and what was measured of it.

Owns: reading what was measured, checking that it is of this file, wording, drawing, the page.
Leaves out: all measuring (`moequant.evaluate`, `moequant.routing`) and sums over a file
(`moequant.inspection`).
"""

from moequant.report.data import ReportData, find_file, gather
from moequant.report.evaluation import Measured
from moequant.report.page import render, write_report

__all__ = ["Measured", "ReportData", "find_file", "gather", "render", "write_report"]
