"""Results as tables for a terminal and as data for `--json`.

Owns: wording, order, units. Leaves out: measuring anything. Sizes are decimal (1 GB = 10⁹ bytes).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moequant.plan import Plan, Preset, fallback_bpw, fallback_rows

if TYPE_CHECKING:
    from moequant.calibrate import Imatrix
    from moequant.inspection import Inspection
    from moequant.pipeline import ExportResult, Fidelity

SHOWN_ROWS = 20  # lines of a list that can be as long as the model has experts
HISTOGRAM = " ▁▂▃▄▅▆▇█"


def size(nbytes: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def count(parameters: int) -> str:
    """A number of parameters, short."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= limit:
            return f"{parameters / limit:.1f}{unit}"
    return str(parameters)


def export_tables(result: "ExportResult", fidelity: "Fidelity | None") -> list[RenderableType]:
    """Fallbacks, thin experts, then size and (if measured) fidelity."""
    tables = _fallback_notes(result.plan)
    if result.imatrix is not None:
        tables += _thin_notes([str(expert) for expert in result.imatrix.thin_experts()])
    tables += _unweighted_notes(result.unweighted)
    tables += [Text(note, style="yellow") for note in result.notes]
    if result.model.left_out:
        tables.append(_left_out(list(result.model.left_out)))
    table = _grid(str(result.path))
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
        "parameters": _parameters(result.parameters),
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
    table = _grid("plan")
    table.add_row("types", f"{plan.preset}: {_type_shares(plan)}")
    table.add_row("size", size(plan.size_bytes))
    table.add_row("bits per weight", f"{plan.bpw:.2f}")
    return [*_fallback_notes(plan), table]


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
    }  # fmt: skip


def imatrix_tables(path: Path, imatrix: "Imatrix") -> list[RenderableType]:
    """What was measured, and every expert that stayed thin."""
    table = _grid(str(path))
    table.add_row("tensors", str(len(imatrix.entries)))
    table.add_row("text", ", ".join(imatrix.datasets))
    table.add_row("tokens", f"{imatrix.chunk_count * imatrix.chunk_size} "
                  f"({imatrix.chunk_count} × {imatrix.chunk_size})")  # fmt: skip
    return [*_thin_notes([str(expert) for expert in imatrix.thin_experts()]), table]


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


def inspection_tables(found: "Inspection") -> list[RenderableType]:
    """Summary, types by role, experts, provenance; what does not apply is left out."""
    summary = _grid(found.path)
    summary.add_row("kind", found.kind)
    if found.parameters is not None:
        parameters = found.parameters
        summary.add_row("architecture", found.architecture)
        summary.add_row("parameters", f"{count(parameters.total)} total, "
                        f"{count(parameters.active)} active per token")  # fmt: skip
        summary.add_row("dense", f"{count(parameters.dense)}, {size(found.dense_bytes)}")
        summary.add_row("experts", f"{count(parameters.expert)}, {size(found.expert_bytes)}")
        summary.add_row("bits per weight", f"{found.bpw:.2f}")
    tables: list[RenderableType] = [summary, _role_table(found)]
    if found.routed_share:
        tables.append(_experts_table(found.routed_share))
    tables += _thin_notes(found.thin_experts)
    if found.left_out:
        tables.append(_left_out(found.left_out))
    tables.append(_metadata_table(found.metadata))
    return tables


def _role_table(found: "Inspection") -> Table:
    columns = ["role", "type", "tensors", "values"]
    if found.nbytes:
        columns += ["size", "bits per weight"]
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in ("role", "type") else "right")
    for role in found.roles:
        row = [role.role, role.qtype, str(role.tensors), count(role.parameters)]
        if found.nbytes:
            row += [size(role.nbytes), f"{role.bpw:.2f}"]
        table.add_row(*row)
    return table


def _experts_table(routed_share: dict[int, list[float]]) -> Table:
    """Per layer: the experts' share of routed tokens, against an even share of 1."""
    table = Table(box=None, header_style="bold", title="experts by routed share (1 = even)")
    for column in ("layer", "least", "most", "experts 0 …"):
        table.add_column(column, justify="right" if column != "experts 0 …" else "left")
    for bid, shares in sorted(routed_share.items()):
        relative = [share * len(shares) for share in shares]
        bars = "".join(HISTOGRAM[min(8, round(4 * value))] for value in relative)
        table.add_row(
            str(bid),
            f"{min(relative):.2f} (e{relative.index(min(relative))})",
            f"{max(relative):.2f} (e{relative.index(max(relative))})",
            bars,
        )
    return table


def _left_out(names: list[str]) -> Text:
    """Checkpoint tensors that are not exported, by the module they belong to."""
    groups: dict[str, int] = {}
    for name in names:
        module = ".".join(name.split(".")[:2])
        groups[module] = groups.get(module, 0) + 1
    listed = ", ".join(f"{module} ({n})" for module, n in groups.items())
    return Text(f"left out: {len(names)} tensors: {listed}", style="yellow")


def _metadata_table(metadata: Mapping[str, Any]) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    for key, value in metadata.items():
        table.add_row(Text(key), Text(str(value)))
    return table


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


def _thin_notes(thin: list[str]) -> list[RenderableType]:
    if not thin:
        return []
    shown = "".join(f"\n  {line}" for line in thin[:SHOWN_ROWS])
    rest = f"\n  … and {len(thin) - SHOWN_ROWS} more" if len(thin) > SHOWN_ROWS else ""
    return [Text(f"{len(thin)} experts stayed thin in calibration:{shown}{rest}", style="yellow")]


def _unweighted_notes(names: tuple[str, ...]) -> list[RenderableType]:
    """Tensors that a search quantized without importance although an imatrix was there."""
    if not names:
        return []
    return [Text(f"quantized without importance (not in the imatrix): {', '.join(names)}")]


def _type_shares(plan: Plan) -> str:
    """`Q4_K 71%, Q6_K 20% …`: each type's part of the bytes."""
    nbytes: dict[str, int] = {}
    for tensor in plan.tensors:
        nbytes[tensor.qtype] = nbytes.get(tensor.qtype, 0) + tensor.size_bytes
    ordered = sorted(nbytes.items(), key=lambda item: -item[1])
    return ", ".join(f"{qtype} {100 * n / plan.size_bytes:.0f}%" for qtype, n in ordered)


def _parameters(parameters: Any) -> dict[str, int]:
    return {"total": parameters.total, "active": parameters.active,
            "dense": parameters.dense, "expert": parameters.expert}  # fmt: skip


def _grid(title: str) -> Table:
    heading = Text(title, style="bold")
    table = Table(box=None, show_header=False, title=heading, title_justify="left")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table
