"""The sections of a report in their order: words, tables and plots.

Owns: what stands in a report and how it is worded. Leaves out: drawing (`plots`) and HTML
(`page`). A section without data is None; `absent` then says how to get it.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

import numpy as np

from moequant.plan import role_of
from moequant.report import plots
from moequant.report.data import ReportData
from moequant.report.evaluation import Measured, ModelFidelity
from moequant.report.model_file import Grid, layer_of, without_bank
from moequant.report.plots import Plot
from moequant.report.routing import Ablation
from moequant.tables.common import count, size

NOT_FINITE = "not finite"
OPEN_ROWS = 12  # a longer table is folded
BARS = 12  # roles that the plot of sizes shows on their own
FIDELITY = ["size", "bits per weight", "PPL", "PPL ratio", "KLD, mean", "KLD, median", "KLD, 99%",
            "KLD, 99.9%", "KLD, largest", "top-1", "RMS Δp"]  # fmt: skip
MARKS = {"median": "median", "p99": "99%", "p999": "99.9%"}
_FALLBACK = re.compile(r"(?P<name>\S+) (?P<wanted>\S+) -> (?P<qtype>\S+): (?P<reason>.*)", re.S)


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first `words` columns hold words and stand left, the others numbers."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    words: int = 1

    @property
    def folded(self) -> bool:
        return len(self.rows) > OPEN_ROWS


@dataclass(frozen=True)
class Section:
    """One heading and what stands under it."""

    title: str
    text: str
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z]+", "-", self.title.lower()).strip("-")


def sections(data: ReportData) -> list[Section]:
    """Every section that there is data for."""
    made = [
        fidelity(data), kld(data), errors_by_layer(data), worst(data), sizes(data), bits(data),
        *expert_bits(data), expert_use(data), routing(data), ablation(data), starved(data),
        fallbacks(data), provenance(data),
    ]  # fmt: skip
    return [section for section in made if section is not None]


def summary(data: ReportData) -> list[tuple[str, str]]:
    """The file in a few figures: (name, value)."""
    found = data.inspection
    rows = [("file", data.path.name), ("architecture", found.architecture)]
    rows += [("size", f"{size(found.nbytes)}"), ("bits per weight", f"{found.bpw:.2f}")]
    if found.parameters is not None:
        rows.append(("parameters", f"{count(found.parameters.total)}"))
        if found.parameters.expert:
            rows.append(("active per token", f"{count(found.parameters.active)}"))
            rows.append(("in experts", f"{count(found.parameters.expert)}, "
                         f"{size(found.expert_bytes)}"))  # fmt: skip
    preset = data.metadata.get("moequant.plan.preset")
    if isinstance(preset, str):
        rows.append(("preset", preset))
    return rows


def absent(data: ReportData) -> list[str]:
    """For everything that could be in this report and is not: how to get it."""
    lines = []
    evaluation = data.evaluation
    if evaluation is None:
        lines.append("Fidelity, KLD and errors by layer: moequant evaluate FILE.gguf --reference "
                     "CHECKPOINT --save evaluation.json, then moequant report FILE.gguf "
                     "--evaluation evaluation.json.")  # fmt: skip
    else:
        if len(evaluation.models) == 1:
            lines.append("Baselines to compare with: moequant evaluate with --baseline nf4.")
        if not evaluation.models[0].layers:
            lines.append("Errors by layer: moequant evaluate with its own engine.")
        if evaluation.models[0].histogram is None:
            lines.append("The distribution of the KLD: moequant evaluate with its own engine.")
    if data.inspection.expert_bytes:
        if not data.inspection.routed_share and data.routing is None:
            lines.append("Expert use: an export with calibration keeps it in the file; so does "
                         "moequant routing, below.")  # fmt: skip
        if data.routing is None:
            lines.append("Routing and the ablation: moequant routing CHECKPOINT --json > "
                         "routing.json, then moequant report FILE.gguf "
                         "--routing routing.json.")  # fmt: skip
    if "moequant.version" not in data.metadata:
        lines.append("Provenance, fallbacks, starved experts: files by moequant export hold them.")
    return lines


def fidelity(data: ReportData) -> Section | None:
    """PPL, KLD and agreement of the file and the baselines."""
    evaluation = data.evaluation
    if evaluation is None:
        return None if data.perplexity is None else _perplexity(*data.perplexity)
    names = [_name(model.name) for model in evaluation.models]
    columns = [_fidelity_column(model) for model in evaluation.models]
    rows = [list(row) for row in zip(FIDELITY, *columns, strict=True)]
    read = evaluation.text
    chat = ", as chat" if read.chat else ""
    text = (
        f"On {_name(read.name)}{chat}: {read.windows} windows of {read.length} tokens, "
        f"{read.tokens} tokens scored, by {evaluation.engine}. The reference, "
        f"{_name(evaluation.reference)}, has PPL {_pm(evaluation.reference_perplexity, '.4f')}. "
        "PPL: perplexity. "
        "KLD: Kullback-Leibler divergence of the file's next-token distribution from the "
        "reference's, in nats. Top-1: how often both rank the same token first. RMS Δp: change of "
        "the right token's probability. After ±: the standard error."
    )
    return Section("Fidelity", text, tables=[Table("Against the reference", ["", *names], rows)])


def _perplexity(before: Measured, after: Measured) -> Section:
    change = ""
    if before.value and after.value is not None:
        change = f"{_finite(100 * (after.value / before.value - 1), '+.2f')}%"
    rows = [["checkpoint", _pm(before, ".4f"), ""], ["this file", _pm(after, ".4f"), change]]
    text = "Perplexity on the same text, measured by the export. After ±: the standard error."
    return Section("Fidelity", text,
                   tables=[Table("Perplexity", ["model", "PPL", "change"], rows)])  # fmt: skip


def _fidelity_column(model: ModelFidelity) -> list[str]:
    """The values of FIDELITY for one model."""
    kld = [_finite(model.kld[name], ".3g") for name in ("median", "p99", "p999", "max")]
    return [
        size(model.nbytes), f"{model.bpw:.2f}", _pm(model.perplexity, ".4f"),
        _pm(model.ppl_ratio, ".4f"), _pm(Measured(model.kld["mean"], model.kld["stderr"]), ".5f"),
        *kld, _pm(model.top1, ".2%"), _pm(model.delta_p_rms, ".2%"),
    ]  # fmt: skip


def kld(data: ReportData) -> Section | None:
    """How the divergence is distributed over tokens."""
    if data.evaluation is None or data.evaluation.models[0].histogram is None:
        return None
    model = data.evaluation.models[0]
    named = {label: model.kld[name] for name, label in MARKS.items()}
    said = ", ".join(f"{label} {_finite(value, '.3g')}" for label, value in named.items())
    largest = _finite(model.kld["max"], ".3g")
    label = f"Histogram of KLD over scored tokens: {said}, largest {largest} nats."
    marks = {label: value for label, value in named.items() if value is not None}
    assert model.histogram is not None
    plot = plots.kld_distribution(model.histogram, marks, label)
    rows = [[name, _finite(value, ".4g")] for name, value in model.kld.items()]
    table = Table("KLD in nats", ["", "value"], rows)
    return Section("Distribution of the KLD", label, [plot], [table])


def errors_by_layer(data: ReportData) -> Section | None:
    """Where in the model the error arises."""
    if data.evaluation is None or not data.evaluation.models[0].layers:
        return None
    models = [(_name(m.name), m.layers) for m in data.evaluation.models if m.layers]
    layers = models[0][1]
    worst = max(layers, key=lambda row: np.inf if row.hidden_nmse is None else row.hidden_nmse)
    label = (f"NMSE of hidden states by layer, {len(layers)} layers: largest "
             f"{_finite(worst.hidden_nmse, '.3g')} after layer {worst.layer}.")  # fmt: skip
    shown = [plots.layer_errors(models, label)]
    overlap = [row.router_overlap for row in layers if row.router_overlap is not None]
    if overlap:
        said = f"Router overlap by layer: from {min(overlap):.1%} to {max(overlap):.1%}."
        shown.append(plots.router_overlap(layers, said))
    rows = [
        [str(row.layer), _finite(row.hidden_nmse, ".3g"), _maybe(row.own_nmse, ".3g"),
         _maybe(row.router_overlap, ".1%")] for row in layers
    ]  # fmt: skip
    table = Table("Error by layer", ["layer", "NMSE", "alone", "router overlap"], rows, words=0)
    text = ("Error energy of the hidden states over that of the reference's. The solid line adds "
            "up from the first layer on. Router overlap: the share of routed experts that file "
            "and reference both choose.")  # fmt: skip
    return Section("Error by layer", text, shown, [table])


def worst(data: ReportData) -> Section | None:
    """Layers and tensors that hurt most."""
    if data.evaluation is None:
        return None
    model = data.evaluation.models[0]
    if not model.worst_tensors and not model.worst_layers:
        return None
    known = {tensor.name: tensor for tensor in model.tensors}
    rows = []
    for name in model.worst_tensors:
        tensor = known.get(name.partition(" ")[0])  # "… expert 3" may follow the name
        nmse = None if tensor is None else tensor.nmse
        rows.append([name, tensor.qtype if tensor else "", _maybe(nmse, ".3g")])
    layers = ", ".join(map(str, model.worst_layers))
    text = f"Layers that add most of the error: {layers}. " if layers else ""
    if rows:
        text += "NMSE of a tensor: what it alone, quantized, puts into its layer's output."
    tables = [Table("Tensors", ["tensor", "type", "NMSE"], rows, words=2)] if rows else []
    return Section("What hurts most", text, tables=tables)


def sizes(data: ReportData) -> Section:
    """Bytes by what a tensor is."""
    totals: dict[str, int] = defaultdict(int)
    for role in data.inspection.roles:
        totals[without_bank(role.role)] += role.nbytes
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    bars = ordered[:BARS]
    if len(ordered) > BARS:
        rest = ordered[BARS - 1 :]
        bars = [*ordered[: BARS - 1], (f"{len(rest)} others", sum(item[1] for item in rest))]
    first = f"; largest: {ordered[0][0]}, {size(ordered[0][1])}" if ordered else ""
    label = f"Bytes by role, {size(data.inspection.nbytes)} in all{first}."
    shown = [plots.size_bars(bars, label)] if bars else []
    rows = [
        [role.role, role.qtype, str(role.tensors), count(role.parameters), size(role.nbytes),
         f"{role.bpw:.2f}"] for role in data.inspection.roles
    ]  # fmt: skip
    head = ["role", "type", "tensors", "values", "size", "bpw"]
    return Section("Size by role", label, shown, [Table("Roles and types", head, rows, words=2)])


def bits(data: ReportData) -> Section | None:
    """Bits per weight of every matrix."""
    if data.bits is None:
        return None
    low, high = np.nanmin(data.bits.values), np.nanmax(data.bits.values)
    label = (f"Bits per weight of {len(data.bits.rows)} kinds of matrices in "
             f"{len(data.bits.columns)} layers: from {low:.2f} to {high:.2f}.")  # fmt: skip
    plot = plots.heat_map(
        data.bits, label, rows="", columns="layer", scale="bits per weight",
        norm=plots.bits_norm(data.bits.values),
    )  # fmt: skip
    table = _grid_table("Bits per weight", data.bits, "tensor, layer →", ".2f")
    return Section("Bits per weight", label, [plot], [table])


def expert_bits(data: ReportData) -> list[Section]:
    """Bits per weight of each expert, where experts of a layer differ."""
    made = []
    for role, grid in data.expert_bits.items():
        label = (f"Bits per weight of each expert of {role}: from {np.nanmin(grid.values):.2f} to "
                 f"{np.nanmax(grid.values):.2f}.")  # fmt: skip
        plot = plots.heat_map(
            grid,
            label,
            rows="layer",
            columns="expert",
            scale="bits per weight",
            norm=plots.bits_norm(grid.values),
        )
        table = _grid_table(f"Bits per weight, {role}", grid, "layer, expert →", ".2f")
        made.append(Section(f"Experts of {role}", label, [plot], [table]))
    return made


def expert_use(data: ReportData) -> Section | None:
    """Share of routed tokens of every expert."""
    shares = data.inspection.routed_share
    text = "calibration text"
    if data.routing is not None:
        shares = {row.layer: row.share for row in data.routing.layers}
        text = f"{', '.join(data.routing.texts)} ({data.routing.tokens} tokens)"
    if not shares:
        return None
    experts = max(map(len, shares.values()))
    values = np.full((len(shares), experts), np.nan)
    for row, (_, share) in enumerate(sorted(shares.items())):
        values[row, : len(share)] = np.array(share) * len(share)
    grid = Grid(list(map(str, sorted(shares))), list(map(str, range(experts))), values)
    label = (f"Expert use, {len(shares)} layers of {experts} experts, relative to an even share "
             f"of 1: from {np.nanmin(values):.2f} to {np.nanmax(values):.2f}.")  # fmt: skip
    plot = plots.heat_map(grid, label, rows="layer", columns="expert",
                          scale="share of routed tokens (1 = even)",
                          norm=plots.relative_norm(values))  # fmt: skip
    table = _grid_table("Share of routed tokens, 1 = even", grid, "layer, expert →", ".2f")
    return Section("Expert use", f"{label} Measured on {text}.", [plot], [table])


def routing(data: ReportData) -> Section | None:
    """Load balance, confidence and specialisation by layer."""
    if data.routing is None or not data.routing.layers:
        return None
    head = ["layer", "Gini", "entropy", "p of top-1", "bits of domain",
        "by chance", "cosine", "branch",
            "dead", "dominant"]  # fmt: skip
    rows = [
        [str(row.layer), f"{row.gini:.3f}", f"{row.entropy:.2f}", f"{row.top1:.3f}",
         _maybe(row.specialisation, ".3f"), _maybe(row.by_chance, ".3f"),
         _maybe(row.cosine_max, ".3f"), _maybe(row.branch_ratio, ".2f"),
         _few(row.dead), _few(row.dominant)]
        for row in data.routing.layers
    ]  # fmt: skip
    text = (
        f"Measured on {_name(data.routing.checkpoint)}. Gini: 0 if every expert serves as many "
        "tokens as any other. Entropy of the load: 1 if it is even. p of top-1: the router's "
        "probability for its first choice. Bits of domain: what an expert tells about a token's "
        "text; by chance: the same with shuffled texts. Cosine: the weights of the two "
        "experts that are most alike. Branch: size of the experts' output over the dense one's."
    )
    return Section("Routing", text, tables=[Table("By layer", head, rows, words=0)])


def ablation(data: ReportData) -> Section | None:
    """What the experts are worth: perplexity with fewer of them."""
    if data.routing is None or not data.routing.ablation:
        return None
    made = data.routing.ablation
    label = "Perplexity by number of experts: " + ", ".join(
        f"{row.name} {_ppl(row)}" for row in made
    )
    rows = [
        [row.name, str(row.experts), _ppl(row),
         f"{row.delta_nll:+.4f} ± {row.delta_nll_stderr:.4f}"] for row in made
    ]  # fmt: skip
    head = ["", "experts", "PPL", "Δ NLL in nats per token"]
    return Section("Ablation", f"{label}. The checkpoint itself, not the file.",
                   [plots.ablation(made, label)], [Table("Ablation", head, rows)])  # fmt: skip


def _ppl(row: Ablation) -> str:
    return "overflowed" if row.ppl is None else f"{row.ppl:.4f} ± {row.stderr or 0:.4f}"


def starved(data: ReportData) -> Section | None:
    """Experts that too few calibration tokens reached."""
    thin = data.inspection.thin_experts
    if not thin:
        return None
    text = (f"{len(thin)} experts stayed thin in calibration: fewer tokens than the floor were "
            "routed to them. They also took the tokens nearest to being routed to them, and "
            "what is still thin was drawn toward the layer's pool.")  # fmt: skip
    return Section("Starved experts", text,
                   tables=[Table("Experts", ["expert"], [[line] for line in thin])])  # fmt: skip


def fallbacks(data: ReportData) -> Section | None:
    """Tensors that could not get the type that the preset wants."""
    lines = data.texts("moequant.plan.fallbacks")
    if not lines:
        return None
    groups: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for line in lines:
        found = _FALLBACK.fullmatch(line)
        if found is None:
            groups[line, "", "", ""].append(line)
            continue
        key = role_of(found["name"]), found["wanted"], found["qtype"], found["reason"]
        layer = layer_of(found["name"])
        groups[key].append("-" if layer is None else str(layer))
    rows = [[*key, _few(layers)] for key, layers in groups.items()]
    head = ["role", "wanted", "got", "reason", "layers"]
    text = f"{len(lines)} tensors have another type than the preset wants for them."
    return Section("Fallbacks", text, tables=[Table("Fallbacks", head, rows, words=5)])


def provenance(data: ReportData) -> Section | None:
    """What made this file, from what."""
    shown = data.inspection.metadata
    rows = [[key, _value(shown[key])] for key in shown
            if key.startswith(("moequant.", "general."))]  # fmt: skip
    if not rows:
        return None
    table = Table("Metadata", ["key", "value"], rows, words=2)
    return Section("Provenance", "What the file says of itself.", tables=[table])


def _grid_table(caption: str, grid: Grid, corner: str, form: str) -> Table:
    rows = [
        [name, *("" if np.isnan(value) else format(value, form) for value in values)]
        for name, values in zip(grid.rows, grid.values, strict=True)
    ]
    return Table(caption, [corner, *grid.columns], rows)


def _pm(measured: Measured, form: str) -> str:
    """A value and its standard error, in `form`; a per cent sign stands once, at the end."""
    if measured.value is None:
        return NOT_FINITE
    value, error = _finite(measured.value, form), _finite(measured.stderr, form)
    return f"{value.removesuffix('%')} ± {error}"


def _finite(value: float | None, form: str) -> str:
    return format(value, form) if value is not None and isfinite(value) else NOT_FINITE


def _maybe(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _few(values: Sequence[int] | Sequence[str], most: int = 12) -> str:
    """The values, the first of them if they are many."""
    shown = ", ".join(map(str, values[:most]))
    return f"{shown}, … ({len(values)})" if len(values) > most else shown


def _name(path: str) -> str:
    """The last part of what may be a path on the machine that measured, or a Hugging Face id."""
    return Path(path).name if Path(path).is_absolute() else path


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
