"""Tables and data of `evaluate`.

Owns: wording, order. Leaves out: measuring. The JSON is what `report` reads.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moequant.tables.common import grid, size

if TYPE_CHECKING:
    from moequant.evaluate.result import Evaluation, Row
    from moequant.evaluate.statistics import Estimate


def evaluation_tables(found: "Evaluation") -> list[RenderableType]:
    """What was run, one column per model, the layers, and what hurts most."""
    tables: list[RenderableType] = [Text(note, style="yellow") for note in found.notes]
    head = grid(found.file)
    head.add_row("reference", f"{found.reference}, perplexity {_pm(found.reference_perplexity)}")
    how = ", as conversations" if found.chat else ""
    head.add_row("text", f"{found.text}{how}: {found.windows} windows of {found.length}, "
                 f"{found.tokens_scored} tokens scored, by {found.engine}")  # fmt: skip
    tables += [head, _rows(found.rows)]
    for row in found.rows[:1]:
        if row.layers:
            tables += [Text("error by layer: NMSE of hidden states", style="bold"), _layers(row)]
        if row.worst_tensors:
            heading = "tensors that hurt most: NMSE that each alone puts into its layer's output"
            tables += [Text(heading, style="bold"), _worst(row)]
    return tables


def evaluation_json(found: "Evaluation") -> dict[str, Any]:
    """What `evaluate --json` prints."""
    return {
        "file": found.file,
        "reference": found.reference,
        "engine": found.engine,
        "text": {"name": found.text, "chat": found.chat, "windows": found.windows,
                 "length": found.length, "tokens_scored": found.tokens_scored},
        "notes": list(found.notes),
        "reference_perplexity": _named("ppl", found.reference_perplexity),
        "models": [_row_json(row) for row in found.rows],
    }  # fmt: skip


def _rows(rows: "tuple[Row, ...]") -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("", style="cyan", no_wrap=True)
    for row in rows:
        table.add_column(row.name, justify="right")
    lines: list[tuple[str, list[str]]] = [
        ("size", [size(row.nbytes) for row in rows]),
        ("bits per weight", [f"{row.bpw:.2f}" for row in rows]),
        ("perplexity", [_pm(row.perplexity) for row in rows]),
        ("PPL / reference", [_pm(row.ppl_ratio, 5) for row in rows]),
        ("KLD mean", [_pm(row.kld.mean, 6) for row in rows]),
        ("KLD median", [f"{row.kld.median:.6f}" for row in rows]),
        ("KLD 99%", [f"{row.kld.p99:.6f}" for row in rows]),
        ("KLD 99.9%", [f"{row.kld.p999:.6f}" for row in rows]),
        ("KLD max", [f"{row.kld.max:.6f}" for row in rows]),
        ("same top token", [_pm(row.top1, 2, 100, "%") for row in rows]),
        ("Δp RMS", [_pm(row.delta_p_rms, 3, 100, "%") for row in rows]),
    ]
    for name, values in lines:
        table.add_row(name, *values)
    return table


def _layers(row: "Row") -> Table:
    """One line per layer: error so far, its own, shared experts; the worst are marked."""
    table = Table(box=None, header_style="bold")
    for column in ("layer", "so far", "its own", "router overlap", ""):
        table.add_column(column, justify="right")
    worst = {layer.layer for layer in row.worst_layers}
    for layer in row.layers:
        overlap = "" if layer.router_overlap is None else f"{100 * layer.router_overlap:.2f}%"
        mark = "← hurts most" if layer.layer in worst and len(row.layers) > len(worst) else ""
        table.add_row(str(layer.layer), f"{layer.hidden_nmse:.2e}", f"{layer.own_nmse:.2e}",
                      overlap, mark)  # fmt: skip
    return table


def _worst(row: "Row") -> Table:
    stored = {tensor.name: tensor for tensor in row.tensors}
    table = Table(box=None, header_style="bold")
    for column in ("tensor", "type", "NMSE"):
        table.add_column(column, justify="right" if column == "NMSE" else "left")
    for error in row.worst_tensors:
        tensor = stored.get(error.name.partition(" ")[0])
        table.add_row(error.name, tensor.qtype if tensor else "", f"{error.nmse:.2e}")
    return table


def _row_json(row: "Row") -> dict[str, Any]:
    edges, counts = row.kld_histogram or ([], [])
    kld = asdict(row.kld)
    kld |= _named("mean", row.kld.mean)
    return {
        "name": row.name,
        "bytes": row.nbytes,
        "bpw": row.bpw,
        "perplexity": _named("ppl", row.perplexity),
        "ppl_ratio": asdict(row.ppl_ratio),
        "kld": kld,
        "kld_histogram": {"edges": edges, "counts": counts} if counts else None,
        "top1": _named("share", row.top1),
        "delta_p": {"mean": row.delta_p_mean.value, "rms": row.delta_p_rms.value,
                    "rms_stderr": row.delta_p_rms.stderr},
        "layers": [asdict(layer) for layer in row.layers],
        "tensors": [asdict(tensor) for tensor in row.tensors],
        "worst_layers": [layer.layer for layer in row.worst_layers],
        "worst_tensors": [tensor.name for tensor in row.worst_tensors],
    }  # fmt: skip


def _named(name: str, estimate: "Estimate") -> dict[str, float]:
    """An estimate under the name its figure goes by, with both errors."""
    return {name: estimate.value, "stderr": estimate.stderr, "token_stderr": estimate.token_stderr}


def _pm(value: "Estimate", digits: int = 4, unit: float = 1.0, sign: str = "") -> str:
    return f"{unit * value.value:.{digits}f} ± {unit * value.stderr:.{digits}f}{sign}"
