"""Two models streamed side by side over the same tokens: where does one part from the other?

Owns: running reference and model layer by layer, each on its own hidden states, with one layer of
each in memory; the error that piles up, and the experts that both choose. Leaves out: what the
models are (`models`), what each part adds (`probe`), divergence of predictions (`divergence`), the
forward (`calibrate.forward`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moequant.calibrate.forward import Progress, StreamedModel
from moequant.calibrate.windows import evenly_spaced
from moequant.evaluate.divergence import Divergence, diverge
from moequant.evaluate.models import MeasuredModel
from moequant.evaluate.perplexity import first_scored
from moequant.evaluate.probe import (
    LayerProbe,
    Sample,
    TensorError,
    TensorProbe,
    check_finite_states,
    nmse,
)


@dataclass(frozen=True)
class LayerError:
    """`router_overlap`: shared experts of the chosen k, averaged over tokens; None without."""

    layer: int
    hidden_nmse: float
    own_nmse: float
    router_overlap: float | None


@dataclass
class Measurement:
    """One model held against the reference.

    `tensors`: only of the first model, where they were asked for, and where both models are made of
    the same tensors.
    """

    model: MeasuredModel
    layers: list[LayerError] = field(default_factory=list)
    tensors: list[TensorError] = field(default_factory=list)
    divergence: Divergence | None = None

    def worst_layers(self, n: int = 3) -> list[LayerError]:
        """The layers that add most error of their own."""
        return sorted(self.layers, key=lambda layer: -layer.own_nmse)[:n]

    def worst_tensors(self, n: int = 3) -> list[TensorError]:
        """The tensors that add most error of their own; none that adds no error at all."""
        added = [tensor for tensor in self.tensors if tensor.nmse > 0]
        return sorted(added, key=lambda tensor: -tensor.nmse)[:n]


@dataclass(frozen=True)
class CompareOptions:
    """`sample_tokens` tokens are used for own and tensor errors; 0 leaves the tensors' out."""

    device: str = "cpu"
    dtype: torch.dtype | None = torch.float32
    sample_tokens: int = 1024
    batch_tokens: int = 4096


def compare(
    reference: MeasuredModel,
    models: Sequence[MeasuredModel],
    windows: Tensor,
    options: CompareOptions,
    progress: Progress = lambda *_: None,
) -> list[Measurement]:
    """Hold each of `models` against `reference` on token ids `windows` (n, length).

    Tensor errors are taken for the first of `models` only. Raises UsageError for windows too short
    to score anything, CalibrationError where a model's numbers stop being finite, and what loading
    weights raises.
    """
    first_scored(windows)  # raises for windows too short
    base = _Stream(reference, windows, options)
    streams = [_Stream(model, windows, options) for model in models]
    ids = windows[evenly_spaced(len(windows), options.sample_tokens // windows.shape[1])]
    sample = Sample(base.model, ids)
    probes = [LayerProbe(sample, stream.model) for stream in streams]
    found = [Measurement(model) for model in models]
    tensors = TensorProbe(sample, streams[0].model) if options.sample_tokens else None
    embedded = nmse(streams[0].hidden, base.hidden)
    for bid in range(reference.spec.block_count):
        with base.model.layer(bid) as layer:
            chosen = base.advance(layer, bid)
            sample.advance(layer, bid)
            for stream, probe, measured in zip(streams, probes, found, strict=True):
                with stream.model.layer(bid) as other:
                    own = probe.own_error(other, bid)
                    if tensors is not None and probe is probes[0]:
                        tensors.measure(layer, other, bid)
                    overlap = _overlap(chosen, stream.advance(other, bid))
                hidden = nmse(stream.hidden, base.hidden)
                measured.layers.append(LayerError(bid, hidden, own, overlap))
        progress("compare", bid + 1, reference.spec.block_count)
    if tensors is not None:
        found[0].tensors += tensors.errors(embedded)
    _score(base, streams, found, windows, progress)
    return found


class _Stream:
    """A model on its way through the windows."""

    def __init__(self, model: MeasuredModel, windows: Tensor, options: CompareOptions) -> None:
        self.name, self.spec = model.name, model.spec
        self.model = StreamedModel(
            model.weights, model.spec, device=options.device, dtype=options.dtype
        )
        self.batches = self.model.embed(windows, options.batch_tokens)

    @property
    def hidden(self) -> list[Tensor]:
        return [batch.hidden for batch in self.batches]

    def advance(self, layer: nn.Module, bid: int) -> Tensor | None:
        """Run all batches through `layer`; the experts chosen, (tokens, k), if it has any."""
        with _chosen_experts(self.model, layer, bid) as chosen:
            for batch in self.batches:
                self.model.run_layer(layer, bid, batch)
        check_finite_states(f"{self.name}, layer {bid}", self.hidden)
        return torch.cat(chosen) if chosen else None

    def normed(self, positions: slice) -> Tensor:
        """The output matrix's input at `positions` of each window, flattened, on the CPU."""
        parts = (batch.hidden[:, positions].flatten(0, 1) for batch in self.batches)
        return torch.cat([self.model.final_norm(part).cpu() for part in parts])


@contextmanager
def _chosen_experts(model: StreamedModel, layer: nn.Module, bid: int) -> Iterator[list[Tensor]]:
    """Collects the experts that the layer's router chooses: one (tokens, k) for each run."""
    chosen: list[Tensor] = []
    stack = [t for t in model.spec.tensors if t.bid == bid and t.is_expert]
    if not stack:
        yield chosen
        return
    path = (model.names.parameter(stack[0].sources[0]) or "").rpartition(".")[0]
    experts = layer.get_submodule(path.removeprefix(f"{model.layers_path}.{bid}."))
    hook = experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1].cpu()))
    try:
        yield chosen
    finally:
        hook.remove()


def _overlap(chosen: Tensor | None, other: Tensor | None) -> float | None:
    """Experts that both chose, as a share of the reference's k."""
    if chosen is None or other is None:
        return None
    shared = (chosen[:, :, None] == other[:, None, :]).any(-1)
    return float(shared.double().mean())


def _score(
    base: _Stream,
    streams: Sequence[_Stream],
    found: Sequence[Measurement],
    windows: Tensor,
    progress: Progress,
) -> None:
    """The predictions of positions n/2 to n-2, on the tokens after them."""
    first = first_scored(windows)
    scored, targets = slice(first, -1), windows[:, first + 1 :].flatten()
    normed = base.normed(scored)
    for number, (stream, measured) in enumerate(zip(streams, found, strict=True), start=1):
        pair = base.model.logits(normed), stream.model.logits(stream.normed(scored))
        measured.divergence = diverge(*pair, targets, len(windows))
        check_finite_states(f"{stream.name} or {base.name}, logits", [measured.divergence.kld])
        progress("logits", number, len(streams))
