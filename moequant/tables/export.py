"""Tables and data of `export`, `plan`, `calibrate` and `presets`.

Owns: wording, order. Leaves out: measuring anything.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moequant.plan import Plan, Preset, fallback_bpw, fallback_rows, role_of
from moequant.tables.common import count, grid, left_out, parameters_json, size, thin_notes

if TYPE_CHECKING:
    from moequant.calibrate import Imatrix
    from moequant.pipeline import ExportResult, Fidelity


def export_tables(result: "ExportResult", fidelity: "Fidelity | None") -> list[RenderableType]:
    """Fallbacks, thin experts, then size and (if measured) fidelity."""
    tables = _fallback_notes(result.plan)
    if result.imatrix is not None:
        tables += thin_notes([str(expert) for expert in result.imatrix.thin_experts()])
    tables += _unweighted_notes(result.unweighted)
    tables += _bank_notes(result.plan)
    tables += [Text(note, style="yellow") for note in result.notes]
    if result.model.left_out:
        tables.append(left_out(list(result.model.left_out)))
    table = grid(str(result.path))
    table.add_row("architecture", result.model.architecture)
    parameters = result.parameters
    table.add_row("parameters", f"{count(parameters.total)} total, {count(parameters.active)} "
                  f"active per token, {count(parameters.expert)} in experts")  # fmt: skip
    edited = f", {len(result.edited)} tensors edited" if result.edited else ""
    table.add_row("types", f"{result.plan.preset}{edited}: {_type_shares(result.plan)}")
    table.add_row("size", f"{size(result.file_bytes)} file, {size(result.plan.size_bytes)} tensors "
                  f"({size(result.source_bytes)} in the checkpoint)")  # fmt: skip
    table.add_row("bits per weight", f"{result.plan.bpw:.2f}")
    if fidelity is not None:
        before, after = fidelity.before, fidelity.after
        table.add_row("perplexity before", f"{before.ppl:.4f} ± {before.stderr:.4f}")
        change = 100 * (after.ppl / before.ppl - 1)
        table.add_row("perplexity after", f"{after.ppl:.4f} ± {after.stderr:.4f} ({change:+.2f}%)")
    return [*tables, table]


def export_json(result: "ExportResult", fidelity: "Fidelity | None") -> dict[str, Any]:
    """What `export --json` prints."""
    data: dict[str, Any] = {
        "file": str(result.path),
        "file_bytes": result.file_bytes,
        "source_bytes": result.source_bytes,
        "architecture": result.model.architecture,
        "parameters": parameters_json(result.parameters),
        **plan_json(result.plan),
        "unweighted": list(result.unweighted),
        "edited": list(result.edited),
        "notes": list(result.notes),
        "left_out": list(result.model.left_out),
    }
    if result.imatrix is not None:
        data["thin_experts"] = [str(expert) for expert in result.imatrix.thin_experts()]
    if fidelity is not None:
        data["perplexity"] = {
            "before": {"ppl": fidelity.before.ppl, "stderr": fidelity.before.stderr},
            "after": {"ppl": fidelity.after.ppl, "stderr": fidelity.after.stderr},
            "tokens": fidelity.before.tokens,
        }
    return data


def plan_tables(plan: Plan) -> list[RenderableType]:
    """Fallbacks, then what the plan comes to."""
    table = grid("plan")
    table.add_row("types", f"{plan.preset}: {_type_shares(plan)}")
    table.add_row("size", size(plan.size_bytes))
    table.add_row("bits per weight", f"{plan.bpw:.2f}")
    return [*_fallback_notes(plan), *_bank_notes(plan), table]


def plan_json(plan: Plan) -> dict[str, Any]:
    """Sums and fallbacks of a plan; the types themselves are in the plan's own file."""
    return {
        "preset": plan.preset,
        "bytes": plan.size_bytes,
        "bpw": plan.bpw,
        "fallbacks": [
            {"role": row.role, "wanted": row.wanted, "type": row.qtype, "reason": row.reason,
             "tensors": list(row.tensors), "extra_bytes": row.extra_bytes,
             "extra_bpw": row.extra_bpw}
            for row in fallback_rows(plan)
        ],
        "fallbacks_extra_bpw": fallback_bpw(plan),
        "banks": {t.name: {qtype: list(ids) for qtype, ids in t.banks.items()}
                  for t in plan.banked},
        "needs_patched_llama_cpp": bool(plan.banked),
    }  # fmt: skip


def imatrix_tables(path: Path, imatrix: "Imatrix") -> list[RenderableType]:
    """What was measured, and every expert that stayed thin."""
    table = grid(str(path))
    table.add_row("tensors", str(len(imatrix.entries)))
    table.add_row("text", ", ".join(imatrix.datasets))
    table.add_row("tokens", f"{imatrix.chunk_count * imatrix.chunk_size} "
                  f"({imatrix.chunk_count} × {imatrix.chunk_size})")  # fmt: skip
    return [*thin_notes([str(expert) for expert in imatrix.thin_experts()]), table]


def imatrix_json(path: Path, imatrix: "Imatrix") -> dict[str, Any]:
    """What `calibrate --json` prints."""
    return {
        "file": str(path),
        "tensors": len(imatrix.entries),
        "datasets": list(imatrix.datasets),
        "chunk_count": imatrix.chunk_count,
        "chunk_size": imatrix.chunk_size,
        "thin_experts": [str(expert) for expert in imatrix.thin_experts()],
    }


def presets_table(presets: Mapping[str, Preset]) -> Table:
    """One line for each preset."""
    table = Table(box=None, header_style="bold")
    for column in ("preset", "default type", "what it is"):
        table.add_column(column)
    for preset in presets.values():
        table.add_row(preset.name, preset.default, preset.description)
    return table


def presets_json(presets: Mapping[str, Preset]) -> list[dict[str, Any]]:
    """What `presets --json` prints."""
    return [
        {"name": p.name, "default": p.default, "file_type": p.file_type,
         "description": p.description} for p in presets.values()
    ]  # fmt: skip


def _fallback_notes(plan: Plan) -> list[RenderableType]:
    """One line per kind of tensor that did not get the type the preset wants for it."""
    rows = fallback_rows(plan)
    if not rows:
        return []
    lines = Text(f"{len(plan.fallbacks)} tensors fell back to another type "
                 f"({fallback_bpw(plan):+.2f} bits per weight over the file):",
                 style="yellow")  # fmt: skip
    for row in rows:
        lines.append(
            f"\n  {row.role} × {len(row.tensors)}{_layers(row.tensors)}: "
            f"{row.wanted} → {row.qtype}, {row.extra_bpw:+.2f} bits per weight, "
            f"{size(row.extra_bytes)} ({row.reason})"
        )
    return [lines]


def _bank_notes(plan: Plan) -> list[RenderableType]:
    """That the file needs a patched llama.cpp, and how many experts have which types."""
    if not plan.banked:
        return []
    lines = Text("This plan gives experts of one layer different types. Only a llama.cpp with "
                 "moequant's patch (expert banks) runs the file; stock llama.cpp and Ollama refuse "
                 "it.", style="yellow")  # fmt: skip
    groups: dict[tuple[str, str], list[str]] = {}
    for tensor in plan.banked:
        groups.setdefault((role_of(tensor.name), tensor.bank_summary), []).append(tensor.name)
    for (role, shown), names in groups.items():
        lines.append(f"\n  {role} × {len(names)}{_layers(names)}: experts of {shown}")
    return [lines]


def _layers(names: Sequence[str]) -> str:
    """` (layers 0-2, 5)` of tensors `blk.N.…`; nothing for tensors outside the layers."""
    numbers = sorted(int(name.split(".")[1]) for name in names if name.startswith("blk."))
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
    return f" (layers {shown})" if shown else ""


def _unweighted_notes(names: tuple[str, ...]) -> list[RenderableType]:
    """Tensors that a search quantized without importance although an imatrix was there."""
    if not names:
        return []
    return [Text(f"quantized without importance (not in the imatrix): {', '.join(names)}")]


def _type_shares(plan: Plan) -> str:
    """`Q4_K 71%, Q6_K 20% …`: each type's part of the bytes."""
    nbytes: dict[str, int] = {}
    for tensor in plan.tensors:
        for qtype, own in tensor.bytes_by_type.items():
            nbytes[qtype] = nbytes.get(qtype, 0) + own
    ordered = sorted(nbytes.items(), key=lambda item: -item[1])
    return ", ".join(f"{qtype} {100 * n / plan.size_bytes:.0f}%" for qtype, n in ordered)
