"""What `moequant evaluate --json` printed, checked and as plain data.

Owns: the fields of that JSON that a report shows. Leaves out: measuring them (`moequant.evaluate`)
and showing them.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from moequant.report.fields import Fields, read_fields

COMMAND = "moequant evaluate --json"
KLD_FIELDS = ("mean", "stderr", "min", "median", "p90", "p95", "p99", "p999", "max")


@dataclass(frozen=True)
class Measured:
    """A value and the standard error of its mean, each None where it is not finite."""

    value: float | None
    stderr: float | None


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` scored tokens lie between `edges[i]` and `edges[i + 1]` (nats)."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class LayerError:
    """One layer against the reference's; NMSE of the hidden states it returns.

    `hidden_nmse` on the file's own inputs (errors add up), `own_nmse` on the reference's inputs,
    `router_overlap` the share of routed experts that both choose. None where not measured, or not
    finite.
    """

    layer: int
    hidden_nmse: float | None
    own_nmse: float | None
    router_overlap: float | None


@dataclass(frozen=True)
class TensorError:
    """NMSE that one tensor alone puts into its layer's output; None where not measured.

    `qtype`: types joined by "+" where the tensor lies in banks. `nbytes`: as it is stored.
    """

    name: str
    qtype: str
    nbytes: int
    nmse: float | None


@dataclass(frozen=True)
class ModelFidelity:
    """How far one model is from the reference.

    `kld` has the keys of KLD_FIELDS, in nats; None where not finite.
    """

    name: str
    nbytes: int
    bpw: float
    perplexity: Measured
    ppl_ratio: Measured
    kld: dict[str, float | None]
    histogram: Histogram | None
    top1: Measured
    delta_p_rms: Measured
    layers: list[LayerError]
    tensors: list[TensorError]
    worst_layers: list[int]
    worst_tensors: list[str]


@dataclass(frozen=True)
class ScoredText:
    """The text that both ran over: `windows` of `length` tokens, `tokens` of them scored."""

    name: str
    chat: bool
    windows: int
    length: int
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """One evaluation. `models[0]` is the file; the others are baselines."""

    file: str
    reference: str
    engine: str
    text: ScoredText
    notes: list[str]
    reference_perplexity: Measured
    models: list[ModelFidelity]


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation in `path`; raises as `read_fields` and its fields do."""
    top = read_fields(path, COMMAND)
    models = top.objects("models")
    if not models:
        raise top.fail("models", "a list with the file's figures first")
    return Evaluation(
        file=top.text("file"),
        reference=top.text("reference"),
        engine=top.text("engine"),
        text=_text(top.object("text")),
        notes=top.texts("notes"),
        reference_perplexity=_measured(top.object("reference_perplexity"), "ppl"),
        models=[_model(model) for model in models],
    )


def _text(text: Fields) -> ScoredText:
    return ScoredText(
        text.text("name"), bool(text.values.get("chat")), text.count("windows"),
        text.count("length"), text.count("tokens_scored"),
    )  # fmt: skip


def _model(model: Fields) -> ModelFidelity:
    kld = model.object("kld")
    return ModelFidelity(
        name=model.text("name"),
        nbytes=model.count("bytes"),
        bpw=model.number("bpw"),
        perplexity=_measured(model.object("perplexity"), "ppl"),
        ppl_ratio=_measured(model.object("ppl_ratio"), "value"),
        kld={name: kld.measured(name) for name in KLD_FIELDS},
        histogram=_histogram(model),
        top1=_measured(model.object("top1"), "share"),
        delta_p_rms=_measured(model.object("delta_p"), "rms", "rms_stderr"),
        layers=[_layer(layer) for layer in model.objects("layers")],
        tensors=[_tensor(tensor) for tensor in model.objects("tensors")],
        worst_layers=model.counts("worst_layers"),
        worst_tensors=model.texts("worst_tensors"),
    )


def _measured(fields: Fields, value: str, stderr: str = "stderr") -> Measured:
    return Measured(fields.measured(value), fields.measured(stderr))


def _histogram(model: Fields) -> Histogram | None:
    if model.values.get("kld_histogram") is None:
        return None
    fields = model.object("kld_histogram")
    edges, counts = fields.numbers("edges"), fields.counts("counts")
    if len(edges) != len(counts) + 1 or any(a >= b for a, b in pairwise(edges)):
        raise fields.fail("edges", f"{len(counts) + 1} rising numbers around {len(counts)} counts")
    return Histogram(edges, counts)


def _layer(layer: Fields) -> LayerError:
    return LayerError(
        layer.count("layer"),
        layer.measured("hidden_nmse"),
        layer.optional("own_nmse"),
        layer.optional("router_overlap"),
    )


def _tensor(tensor: Fields) -> TensorError:
    return TensorError(
        tensor.text("name"), tensor.text("qtype"), tensor.count("nbytes"), tensor.optional("nmse")
    )
