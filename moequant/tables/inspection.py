"""Tables of `inspect`.

Owns: wording, order. Leaves out: looking (`inspection`).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moequant.tables.common import count, grid, left_out, size, thin_notes

if TYPE_CHECKING:
    from moequant.inspection import Inspection

HISTOGRAM = " ▁▂▃▄▅▆▇█"


def inspection_tables(found: "Inspection") -> list[RenderableType]:
    """Summary, types by role, experts, provenance; what does not apply is left out."""
    summary = grid(found.path)
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
    tables += thin_notes(found.thin_experts)
    if found.left_out:
        tables.append(left_out(found.left_out))
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


def _metadata_table(metadata: Mapping[str, Any]) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    for key, value in metadata.items():
        table.add_row(Text(key), Text(str(value)))
    return table
