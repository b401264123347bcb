"""The table and the data of `validate`.

Owns: wording, order. Leaves out: checking anything.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moequant.tables.common import SHOWN_ROWS
from moequant.validate.cases import (
    FINDINGS,
    NMSE_LIMITS,
    NOT_APPLICABLE,
    NOT_CHECKED,
    PASSED,
    ROW_LIMIT,
    UNSUPPORTED,
    CaseResult,
)
from moequant.validate.run import Subject, Validation, badness

COLOURS = {PASSED: "green", UNSUPPORTED: "dim", NOT_APPLICABLE: "dim", NOT_CHECKED: "yellow"}
TOLD = (PASSED, *FINDINGS)


def validation_tables(validation: Validation) -> list[RenderableType]:
    """A row per subject and place; then what failed, the worst case, and what was left out."""
    table = Table(box=None, header_style="bold")
    for heading in ("op", "of", "first in", "backend/buffer", "cases", "worst NMSE", "verdict"):
        table.add_column(heading, overflow="fold")
    for subject in validation.subjects:
        for place in dict.fromkeys(result.case.place for result in validation.results):
            results = _of(validation, subject, place)
            if results:
                table.add_row(*_row(subject, place, results))
    for name in validation.missing:
        table.add_row("", "", "", name, "0", "", Text(NOT_CHECKED, COLOURS[NOT_CHECKED]))
    return [table, *_findings(validation), *_remarks(validation)]


def _of(validation: Validation, subject: Subject, place: str) -> list[CaseResult]:
    return [r for r in validation.results
            if (r.case.op, r.case.subject, r.case.place) == (subject.op, subject.name, place)
            ]  # fmt: skip


def _row(subject: Subject, place: str, results: Sequence[CaseResult]) -> list[Any]:
    told = [result for result in results if result.verdict in TOLD]
    finite = [result.nmse for result in told if result.nmse == result.nmse]
    worst = f"{max(finite):.2g}" if finite else ""
    counts = Counter(result.verdict for result in results)
    found = [f"{verdict} {counts[verdict]}" for verdict in FINDINGS if counts[verdict]]
    if found:
        verdict = Text(", ".join(found), "bold red")
    elif told:
        verdict = Text(PASSED, COLOURS[PASSED])
    else:
        likely = next(v for v in (NOT_CHECKED, UNSUPPORTED, NOT_APPLICABLE) if counts[v])
        verdict = Text(likely, COLOURS[likely])
    return [subject.op, subject.what, subject.name, place, str(len(told)), worst, verdict]


def _findings(validation: Validation) -> list[RenderableType]:
    worst = validation.worst
    if worst is None:
        return []
    shown = sorted(validation.findings, key=badness, reverse=True)
    lines = [f"{r.verdict}: {r.case.name}: {r.detail}" for r in shown[:SHOWN_ROWS]]
    if len(shown) > SHOWN_ROWS:
        lines.append(f"… and {len(shown) - SHOWN_ROWS} more")
    heading = "the worst case" if shown else "the worst case, within its limit"
    return [*(Text(line, "red") for line in lines),
            Text(f"{heading}, again:\n  {validation.command(worst)}")]  # fmt: skip


def _remarks(validation: Validation) -> list[RenderableType]:
    limits = ", ".join(f"{op} {limit:g}" for op, limit in NMSE_LIMITS.items())
    counts = Counter(result.verdict for result in validation.results)
    skip = "skips" if validation.skip else "does not skip"
    parts = dict.fromkeys(f"{r.case.subject}: {r.part}" for r in validation.results if r.part)
    total = ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) or "no case"
    return [
        Text(f"{total}; ggml {validation.version} in {validation.library}, which {skip} "
             "negative ids"),
        Text(f"NMSE limits: {limits}; for one row {ROW_LIMIT:g}. The reference does not round "
             "activations; CPU kernels round them to 8 bits, most of what is seen.", "dim"),
        *(Text(f"not checked: {name} is not in this library", "yellow")
          for name in validation.missing),
        *(Text(note, "dim") for note in validation.notes),
        Text("used: " + "; ".join(parts), "dim"),
    ]  # fmt: skip


def validation_json(validation: Validation) -> dict[str, Any]:
    """What `validate --json` prints; a value that was not computed is null."""
    worst = validation.worst
    return {
        "file": str(validation.file),
        "library": str(validation.library),
        "ggml_version": validation.version,
        "skips_negative_ids": validation.skip,
        "places": [{**vars(place), "name": place.name} for place in validation.places],
        "not_checked": list(validation.missing),
        "notes": list(validation.notes),
        "limits": {**NMSE_LIMITS, "row": ROW_LIMIT},
        "checked": validation.checked,
        "passed": validation.checked > 0 and not validation.findings,
        "subjects": [vars(subject) for subject in validation.subjects],
        "worst": None if worst is None else {**_result_json(worst),
                                             "command": validation.command(worst)},
        "cases": [_result_json(result) for result in validation.results],
    }  # fmt: skip


def _result_json(result: CaseResult) -> dict[str, Any]:
    return {**vars(result.case), "case": result.case.name, "verdict": result.verdict,
            "nmse": result.nmse, "worst_row": result.row, "detail": result.detail,
            "part": result.part}  # fmt: skip
