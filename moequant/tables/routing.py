"""Tables and JSON of `routing`.

Owns: wording, order. Leaves out: the figures (`routing.analysis`).
"""

import math
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moequant.tables.common import SHOWN_ROWS, grid, size

if TYPE_CHECKING:
    from moequant.routing.ablation import Ablated
    from moequant.routing.analysis import LayerRouting, RoutingAnalysis

NOT_MEASURED = "–"
_TEXT_COLUMNS = 8  # texts with a column of their own in a table
_WITHIN = 0.01  # of perplexity: what the verdict calls as good


def routing_tables(found: "RoutingAnalysis") -> list[RenderableType]:
    """Notes, summary, layers, dead and dominant experts, specialists, ablation and verdict."""
    summary = grid(found.checkpoint)
    summary.add_row("experts", f"{found.experts} per layer, {found.experts_used} per token, in "
                    f"{len(found.layers)} layers")  # fmt: skip
    summary.add_row("texts", ", ".join(f"{name} ({n} tokens)" for name, n in found.texts.items()))
    tokens = sum(found.texts.values())
    windows = tokens // found.sequence_length
    summary.add_row("sequences", f"{windows} of {found.sequence_length} tokens")
    summary.add_row("tokens per expert", f"{tokens * found.experts_used / found.experts:.0f} if "
                    f"all were used alike, of {tokens}")  # fmt: skip
    tables: list[RenderableType] = [Text(note, style="yellow") for note in found.notes]
    tables += [summary, _use_table(found), _difference_table(found), *_uneven_notes(found)]
    if len(found.texts) > 1:
        tables += _specialists_table(found)
    if found.ablation is not None:
        tables.append(_ablation_table(found.ablation, found.experts_used))
        tables.append(Text(_error_note(found), style="dim"))
        if len(found.texts) > 1:
            tables.append(_by_text_table(found.ablation))
        tables.append(Text(verdict(found.ablation, found)))
    return tables


def _use_table(found: "RoutingAnalysis") -> Table:
    """Per layer: how evenly experts are used, and how sure the router is."""
    table = _table("use of experts, and the router (1 = an even share)")
    for column in ("layer", "Gini", "entropy", "least", "most", "dead", "dominant", "p of top-1",
                   f"p of top-{found.experts_used}", "router entropy"):  # fmt: skip
        table.add_column(column, justify="right")
    for layer in found.layers:
        relative = (layer.share * len(layer.share)).tolist()
        ends = min(relative), max(relative)
        table.add_row(
            str(layer.layer),
            f"{layer.gini:.2f}",
            f"{layer.entropy:.3f}",
            *(f"{value:.2f} (e{relative.index(value)})" for value in ends),
            str(len(layer.dead)),
            str(len(layer.dominant)),
            f"{layer.confidence.top1:.2f}",
            f"{layer.confidence.chosen_mass:.2f}",
            f"{layer.confidence.entropy:.2f}",
        )
    return table


def _difference_table(found: "RoutingAnalysis") -> Table:
    """Per layer: how different experts are, and how large their branch is."""
    table = _table("how experts differ, and the size of their branch")
    for column in ("layer", "bits of domain", "by chance", "mean cosine", "largest cosine",
                   "experts / dense branch", "cosine of both"):  # fmt: skip
        table.add_column(column, justify="right")
    for layer in found.layers:
        domains, cosine, branch = layer.domains, layer.cosine, layer.branch
        several = len(found.texts) > 1
        table.add_row(
            str(layer.layer),
            f"{domains.bits:.3f}" if several else NOT_MEASURED,
            f"{domains.chance_bits:.3f}" if several else NOT_MEASURED,
            _cosine(cosine.mean) if cosine else NOT_MEASURED,
            f"{_cosine(cosine.max)} (e{cosine.pair[0]}, e{cosine.pair[1]})"
            if cosine
            else NOT_MEASURED,
            f"{branch.ratio:.3f}" if branch else NOT_MEASURED,
            _cosine(branch.cosine) if branch else NOT_MEASURED,
        )
    return table


def _table(title: str) -> Table:
    return Table(box=None, header_style="bold", title=Text(title, style="bold", no_wrap=True),
                 title_justify="left")  # fmt: skip


def _cosine(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # no -0.000


def _uneven_notes(found: "RoutingAnalysis") -> list[RenderableType]:
    """Dead and dominant experts by layer, in one list."""
    lines = []
    for layer in found.layers:
        for what, experts in (("no token reached", layer.dead), ("dominated by", layer.dominant)):
            if experts:
                lines.append(f"layer {layer.layer}: {what} {_experts(experts)}")
    if not lines:
        return [Text("No expert is dead, none dominates its layer.")]
    rest = f"\n… and {len(lines) - SHOWN_ROWS} more" if len(lines) > SHOWN_ROWS else ""
    return [Text("\n".join(lines[:SHOWN_ROWS]) + rest, style="yellow")]


def _experts(experts: list[int]) -> str:
    shown = ", ".join(f"e{expert}" for expert in experts[:SHOWN_ROWS])
    more = len(experts) - SHOWN_ROWS
    return f"{shown} and {more} more" if more > 0 else shown


def _specialists_table(found: "RoutingAnalysis") -> list[RenderableType]:
    """The most specialised experts of all layers, most first; none if nobody could be told."""
    every = [(layer.layer, s) for layer in found.layers for s in layer.domains.specialists]
    if not all(layer.domains.enough for layer in found.layers):
        return []
    if not every:
        return [Text("No expert prefers a text by more than chance would have it.")]
    every.sort(key=lambda pair: -pair[1].ratio)
    table = _table("experts that prefer a text")
    for column in ("layer", "expert", "text", "times as often as on average"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for bid, one in every[: SHOWN_ROWS // 2]:
        table.add_row(str(bid), f"e{one.expert}", Text(one.domain), f"{one.ratio:.1f}")
    return [table]


def _ablation_table(ablation: "list[Ablated]", used: int) -> Table:
    table = _table("perplexity with fewer experts")
    table.add_column("experts")
    for column in ("perplexity", "change", "Δ nats per token"):
        table.add_column(column, justify="right")
    for one in ablation:
        whole = one.experts == used
        table.add_row(
            one.name,
            f"{_short(one.perplexity.value)} ± {_short(one.perplexity.stderr)}",
            NOT_MEASURED if whole else f"{_growth(one.delta_nll.value):+.1%}",
            NOT_MEASURED if whole else f"{one.delta_nll.value:+.4f} ± {one.delta_nll.stderr:.4f}",
        )
    return table


def _error_note(found: "RoutingAnalysis") -> str:
    """What stands behind ± in the table above."""
    numbers = [n // found.sequence_length for n in found.texts.values()]
    if sum(numbers) == 1:
        return "±: standard error as if tokens were independent, too small; take more sequences."
    said = f"±: standard error over the {sum(numbers)} sequences, since tokens of one are alike"
    if min(numbers) > 1:
        return f"{said}, within each text; that of Δ is paired."
    return f"{said}; that of Δ is paired. Too large, since a text has one sequence only."


def _by_text_table(ablation: "list[Ablated]") -> Table:
    names = list(ablation[0].by_text)
    more = f", the first {_TEXT_COLUMNS} of {len(names)}" if len(names) > _TEXT_COLUMNS else ""
    table = _table(f"perplexity by text{more}")
    table.add_column("experts")
    for name in names[:_TEXT_COLUMNS]:
        table.add_column(Text(name), justify="right")
    for one in ablation:
        values = [_short(one.by_text[name]) for name in names[:_TEXT_COLUMNS]]
        table.add_row(one.name, *values)
    return table


def verdict(ablation: "list[Ablated]", found: "RoutingAnalysis") -> str:
    """What the experts do for perplexity, and what they take in the checkpoint, in words."""
    whole = next(one for one in ablation if one.experts == found.experts_used)
    said = [_effect(one, whole) for one in ablation if one.experts == 0]
    enough = [
        one
        for one in ablation
        if 0 < one.experts < found.experts_used and _growth(one.delta_nll.value) <= _WITHIN
    ]
    if enough:
        said.append(f"{enough[0].name} is within {_WITHIN:.0%} of {whole.name}.")
    said.append(
        f"The experts take {size(found.expert_bytes)} of the checkpoint's "
        f"{size(found.total_bytes)} ({found.expert_bytes / found.total_bytes:.0%})."
    )
    return " ".join(said)


def _effect(off: "Ablated", whole: "Ablated") -> str:
    """The sentence on the experts' branch; nothing is claimed within two standard errors."""
    change = -_growth(-off.delta_nll.value)
    without = _short(off.perplexity.value)
    figures = f"{without} without, {_short(whole.perplexity.value)} with {whole.name}"
    if abs(off.delta_nll.value) <= 2 * off.delta_nll.stderr:
        return (
            "These texts cannot tell whether the experts lower or raise perplexity, since Δ is "
            f"within two standard errors ({figures})."
        )
    verb = "lower" if change > 0 else "raise"
    return f"The experts {verb} perplexity by {abs(change):.1%} ({figures})."


def _growth(delta_nll: float) -> float:
    """The relative change of perplexity that belongs to a difference in nats."""
    return math.expm1(min(delta_nll, 700.0))


def _short(value: float) -> str:
    """Four digits, without an exponent."""
    digits = 3 - math.floor(math.log10(value)) if 0 < value < math.inf else 3
    return f"{value:.{min(max(digits, 0), 4)}f}"


def routing_json(found: "RoutingAnalysis") -> dict[str, Any]:
    """Everything as data; a perplexity that is infinite is null."""
    return {
        "checkpoint": found.checkpoint,
        "texts": [{"name": name, "tokens": n} for name, n in found.texts.items()],
        "sequence_length": found.sequence_length,
        "experts": found.experts,
        "experts_used": found.experts_used,
        "expert_bytes": found.expert_bytes,
        "total_bytes": found.total_bytes,
        "layers": [_layer_json(layer) for layer in found.layers],
        "ablation": None if found.ablation is None else [_ablated_json(a) for a in found.ablation],
        "verdict": None if found.ablation is None else verdict(found.ablation, found),
        "notes": list(found.notes),
    }


def _layer_json(layer: "LayerRouting") -> dict[str, Any]:
    domains, cosine, branch = layer.domains, layer.cosine, layer.branch
    return {
        "layer": layer.layer,
        "share": layer.share.tolist(),
        "gate_share": layer.gate_share.tolist(),
        "gini": layer.gini,
        "entropy": layer.entropy,
        "confidence": vars(layer.confidence),
        "dead": layer.dead,
        "dominant": layer.dominant,
        "domain_share": {name: share.tolist() for name, share in domains.domain_share.items()},
        "specialisation_bits": domains.bits,
        "specialisation_chance_bits": domains.chance_bits,
        "specialists": [vars(one) for one in domains.specialists],
        "cosine": cosine and {"mean": cosine.mean, "max": cosine.max, "pair": [*cosine.pair]},
        "branch": branch and {**vars(branch), "ratio": _finite(branch.ratio)},
    }


def _ablated_json(one: "Ablated") -> dict[str, Any]:
    return {
        "name": one.name,
        "experts": one.experts,
        "ppl": _finite(one.perplexity.value),
        "stderr": _finite(one.perplexity.stderr),
        "token_stderr": _finite(one.perplexity.token_stderr),
        "delta_nll": one.delta_nll.value,
        "delta_nll_stderr": one.delta_nll.stderr,
        "delta_nll_token_stderr": one.delta_nll.token_stderr,
        "ppl_by_text": {name: _finite(value) for name, value in one.by_text.items()},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
