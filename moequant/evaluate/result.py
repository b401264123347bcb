"""What an evaluation found, whichever engine ran it.

Owns: these records, and making them from a comparison of ours. Leaves out: measuring (`compare`,
`llama_engine`), and printing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moequant.evaluate.compare import LayerError, Measurement
from moequant.evaluate.divergence import Divergence
from moequant.evaluate.probe import TensorError
from moequant.evaluate.statistics import Estimate

SHOWN_WORST = 3


@dataclass(frozen=True)
class KLD:
    """KL divergence from the reference in nats, over scored tokens; `p90`: 90 % are under it."""

    mean: Estimate
    min: float
    median: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float


@dataclass(frozen=True)
class StoredTensor:
    """Type and bytes of a GGUF tensor, and the error it makes where that was measured."""

    name: str
    qtype: str
    nbytes: int
    layer: int | None
    nmse: float | None


@dataclass(frozen=True)
class Row:
    """One model against the reference. Layers, tensors and histogram are our own engine's."""

    name: str
    nbytes: int
    bpw: float
    perplexity: Estimate
    ppl_ratio: Estimate
    kld: KLD
    top1: Estimate
    delta_p_mean: Estimate
    delta_p_rms: Estimate
    kld_histogram: tuple[list[float], list[int]] | None = None
    layers: tuple[LayerError, ...] = ()
    tensors: tuple[StoredTensor, ...] = ()
    worst_layers: tuple[LayerError, ...] = ()
    worst_tensors: tuple[TensorError, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """`rows`: the file, then the baselines. `text` is the text's name."""

    file: str
    reference: str
    engine: str
    text: str
    chat: bool
    windows: int
    length: int
    tokens_scored: int
    reference_perplexity: Estimate
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def rows_of(measurements: Sequence[Measurement]) -> tuple[Row, ...]:
    """Rows for models that were compared here."""
    return tuple(_row(measured) for measured in measurements)


def _row(measured: Measurement) -> Row:
    found = measured.divergence
    assert found is not None
    model = measured.model
    return Row(
        name=model.name,
        nbytes=model.nbytes,
        bpw=model.bpw,
        perplexity=found.perplexity,
        ppl_ratio=found.ppl_ratio,
        kld=_kld(found),
        top1=found.agreement,
        delta_p_mean=found.mean_delta_p,
        delta_p_rms=found.rms_delta_p,
        kld_histogram=found.kld_histogram(),
        layers=tuple(measured.layers),
        tensors=_stored(measured),
        worst_layers=tuple(measured.worst_layers(SHOWN_WORST)),
        worst_tensors=tuple(measured.worst_tensors(SHOWN_WORST)),
    )


def _kld(found: Divergence) -> KLD:
    at = found.kld_percentile
    return KLD(found.mean_kld, at(0.0), at(0.5), at(0.9), at(0.95), at(0.99), at(0.999), at(1.0))


def _stored(measured: Measurement) -> tuple[StoredTensor, ...]:
    errors = {error.name: error.nmse for error in measured.tensors}
    bids = {tensor.name: tensor.bid for tensor in measured.model.spec.tensors}
    return tuple(
        StoredTensor(name, qtype, nbytes, bids.get(name), errors.get(name))
        for name, (qtype, nbytes) in measured.model.qtypes.items()
    )
