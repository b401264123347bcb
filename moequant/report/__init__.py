"""One self-contained HTML page about a GGUF file and what was measured of it."""

from moequant.report.data import ReportData, find_file, gather
from moequant.report.evaluation import Measured
from moequant.report.page import render, write_report

__all__ = ["Measured", "ReportData", "find_file", "gather", "render", "write_report"]
