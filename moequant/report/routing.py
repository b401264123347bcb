"""What `moequant routing --json` printed, checked and as plain data.

Owns: the fields of that JSON that a report shows. Leaves out: measuring them (`moequant.routing`)
and showing them.
"""

from dataclasses import dataclass
from pathlib import Path

from moequant.report.fields import Fields, read_fields

COMMAND = "moequant routing --json"


@dataclass(frozen=True)
class LayerRouting:
    """One layer's routing. `share` sums to 1 over the experts, `entropy` of an even load is 1.

    `specialisation`: bits that an expert tells about the text's domain; `by_chance`: the same for
    shuffled domains.
    `branch_ratio`: RMS of the experts' branch over that of the dense branch it is added to, None
    where there is no such branch.
    """

    layer: int
    share: list[float]
    gini: float
    entropy: float
    top1: float
    dead: list[int]
    dominant: list[int]
    specialisation: float | None
    by_chance: float | None
    cosine_max: float | None
    branch_ratio: float | None


@dataclass(frozen=True)
class Ablation:
    """Perplexity with another number of experts (0: their branch is off); None: it overflowed."""

    name: str
    experts: int
    ppl: float | None
    stderr: float | None
    delta_nll: float
    delta_nll_stderr: float


@dataclass(frozen=True)
class Routing:
    """One routing analysis."""

    checkpoint: str
    texts: list[str]
    tokens: int
    layers: list[LayerRouting]
    ablation: list[Ablation]


def read_routing(path: Path) -> Routing:
    """The routing analysis in `path`; raises as `read_fields` and its fields do."""
    top = read_fields(path, COMMAND)
    texts = top.objects("texts")
    rows = [] if top.values.get("ablation") is None else top.objects("ablation")
    return Routing(
        checkpoint=top.text("checkpoint"),
        texts=[text.text("name") for text in texts],
        tokens=sum(text.count("tokens") for text in texts),
        layers=[_layer(layer) for layer in top.objects("layers")],
        ablation=[_ablation(row) for row in rows],
    )


def _layer(layer: Fields) -> LayerRouting:
    share = layer.numbers("share")
    if not share or any(not 0 <= value <= 1 for value in share):
        raise layer.fail("share", "a share from 0 to 1 for each expert")
    cosine = None if layer.values.get("cosine") is None else layer.object("cosine")
    branch = None if layer.values.get("branch") is None else layer.object("branch")
    return LayerRouting(
        layer=layer.count("layer"),
        share=share,
        gini=layer.number("gini"),
        entropy=layer.number("entropy"),
        top1=layer.object("confidence").number("top1"),
        dead=layer.counts("dead"),
        dominant=layer.counts("dominant"),
        specialisation=layer.optional("specialisation_bits"),
        by_chance=layer.optional("specialisation_chance_bits"),
        cosine_max=None if cosine is None else cosine.optional("max"),
        branch_ratio=None if branch is None else branch.optional("ratio"),
    )


def _ablation(row: Fields) -> Ablation:
    return Ablation(
        row.text("name"),
        row.count("experts"),
        row.optional("ppl"),
        row.optional("stderr"),
        row.number("delta_nll"),
        row.number("delta_nll_stderr"),
    )
