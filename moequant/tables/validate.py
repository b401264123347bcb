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
    ERROR,
    FINDINGS,
    NOT_APPLICABLE,
    NOT_CHECKED,
    PASSED,
    UNSUPPORTED,
    CaseResult,
)
from moequant.validate.run import Subject, Validation, badness

COLOURS = {PASSED: "green", UNSUPPORTED: "dim", NOT_APPLICABLE: "dim", NOT_CHECKED: "yellow",
           ERROR: "bold red"}  # fmt: skip
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
    finite = [r.errors.nmse for r in told if r.errors.nmse == r.errors.nmse]
    worst = f"{max(finite):.2g}" if finite else ""
    counts = Counter(result.verdict for result in results)
    found = [f"{verdict} {counts[verdict]}" for verdict in (*FINDINGS, ERROR)
             if counts[verdict]]  # fmt: skip
    if found:
        verdict = Text(", ".join(found), "bold red")
    elif told:
        verdict = Text(PASSED, COLOURS[PASSED])
    else:
        likely = next(v for v in (NOT_CHECKED, UNSUPPORTED, NOT_APPLICABLE) if counts[v])
        verdict = Text(likely, COLOURS[likely])
    return [subject.op, subject.what, subject.name, place, str(len(told)), worst, verdict]


def _findings(validation: Validation) -> list[RenderableType]:
    wrong = [r for r in validation.results if r.verdict in (*FINDINGS, ERROR)]
    shown = sorted(wrong, key=badness, reverse=True)
    lines = [f"{r.verdict}: {r.case.name}: {r.detail}" for r in shown[:SHOWN_ROWS]]
    if len(shown) > SHOWN_ROWS:
        lines.append(f"… and {len(shown) - SHOWN_ROWS} more")
    found: list[RenderableType] = [Text(line, "red") for line in lines]
    worst = validation.worst
    if worst is not None:
        within = "" if validation.findings else ", within its limits"
        found.append(Text(f"the worst case{within}, again:\n  {validation.command(worst)}"))
    return found


def _remarks(validation: Validation) -> list[RenderableType]:
    counts = Counter(result.verdict for result in validation.results)
    skips = "skips" if validation.skips else "does not skip"
    parts = dict.fromkeys(f"{r.case.subject}: {r.part}" for r in validation.results
                          if r.part not in ("", "whole"))  # fmt: skip
    total = ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) or "no case"
    return [
        Text(f"{total}; ggml {validation.version} in {validation.library}, which {skips} "
             "negative ids"),
        Text("The reference does not round activations; CPU kernels round them to 8 bits where "
             "weights are quantized, most of what is seen.", "dim"),
        *(Text(f"not checked: {name} is not in this library", "yellow")
          for name in validation.missing),
        *(Text(note, "dim") for note in validation.notes),
        *(Text(f"cut to fit into memory: {part}", "yellow") for part in parts),
    ]  # fmt: skip


def validation_json(validation: Validation) -> dict[str, Any]:
    """What `validate --json` prints; a value that was not computed is null."""
    worst = validation.worst
    return {
        "file": str(validation.file),
        "library": str(validation.library),
        "ggml_version": validation.version,
        "skips_negative_ids": validation.skips,
        "places": [{**vars(place), "name": place.name} for place in validation.places],
        "not_checked": list(validation.missing),
        "notes": list(validation.notes),
        "checked": validation.checked,
        "passed": validation.passed,
        "subjects": [vars(subject) for subject in validation.subjects],
        "worst": None if worst is None else {**_result_json(worst),
                                             "command": validation.command(worst)},
        "cases": [_result_json(result) for result in validation.results],
    }  # fmt: skip


def _result_json(result: CaseResult) -> dict[str, Any]:
    return {**vars(result.case), "case": result.case.name, "verdict": result.verdict,
            "nmse": result.errors.nmse, "nmse_limit": result.limit,
            "worst_value": result.errors.value, "bias": result.errors.bias,
            "detail": result.detail, "part": result.part}  # fmt: skip
