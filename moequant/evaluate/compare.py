"""Two models streamed side by side over the same tokens: where does one part from the other?

Owns: running reference and model layer by layer, each on its own hidden states, with one layer of
each in memory; the error of each layer and tensor; the experts that both choose. Leaves out: what
the models are (`models`), divergence of predictions (`divergence`), the forward (`forward`).

Errors are NMSE of hidden states: |h' - h|² / |h|² of a token, averaged over tokens, so that the few
tokens with huge activations (BOS) do not decide. Three of them:

    hidden   after layer N, the model on its own hidden states: what has piled up so far
    own      after layer N, the model's layer on the *reference's* hidden states: what it adds
    tensor   the same, with this one tensor of the model in the reference's layer

The last two are taken on a sample of windows. For the output matrix the tensor error is that of the
logits, each token's less their mean, which softmax does not see.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moequant.architectures import TensorSpec
from moequant.calibrate.forward import Batch, Progress, StreamedModel
from moequant.evaluate.divergence import Divergence, diverge
from moequant.evaluate.models import MeasuredModel
from moequant.evaluate.perplexity import first_scored


@dataclass(frozen=True)
class LayerError:
    """`router_overlap`: shared experts of the chosen k, averaged over tokens; None without."""

    layer: int
    hidden_nmse: float
    own_nmse: float
    router_overlap: float | None


@dataclass(frozen=True)
class TensorError:
    """What one tensor of the model does to its layer's output; `layer` None outside layers."""

    name: str
    layer: int | None
    nmse: float


@dataclass
class Measurement:
    """One model held against the reference; `tensors` only where they were asked for."""

    model: MeasuredModel
    layers: list[LayerError] = field(default_factory=list)
    tensors: list[TensorError] = field(default_factory=list)
    divergence: Divergence | None = None

    def worst_layers(self, n: int = 3) -> list[LayerError]:
        """The layers that add most error of their own."""
        return sorted(self.layers, key=lambda layer: -layer.own_nmse)[:n]

    def worst_tensors(self, n: int = 3) -> list[TensorError]:
        """The tensors that add most error of their own."""
        return sorted(self.tensors, key=lambda tensor: -tensor.nmse)[:n]


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
    to score anything, and what loading weights raises.
    """
    first_scored(windows)  # raises for windows too short
    base = _Stream(reference, windows, options)
    streams = [_Stream(model, windows, options) for model in models]
    sample = _sample(base.model, windows, options)
    found = [Measurement(model) for model in models]
    embedded = nmse(streams[0].hidden, base.hidden)
    found[0].tensors.append(TensorError("token_embd.weight", None, embedded))
    for bid in range(reference.spec.block_count):
        with base.model.layer(bid) as layer:
            chosen = base.advance(layer, bid)
            expected = base.model.peek(layer, bid, sample)
            for stream, measured in zip(streams, found, strict=True):
                with stream.model.layer(bid) as other:
                    own = nmse([base.model.peek(other, bid, sample)], [expected])
                    if measured is found[0] and options.sample_tokens:
                        swap = _Swap(base, stream, layer, other, bid)
                        measured.tensors += swap.errors(sample, expected)
                    overlap = _overlap(chosen, stream.advance(other, bid))
                hidden = nmse(stream.hidden, base.hidden)
                measured.layers.append(LayerError(bid, hidden, own, overlap))
            base.model.run_layer(layer, bid, sample)
        progress("compare", bid + 1, reference.spec.block_count)
    if options.sample_tokens:
        found[0].tensors += _output_error(base.model, streams[0].model, sample)
    _score(base, streams, found, windows, progress)
    return found


def nmse(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Mean over tokens of |values - expected|² / |expected|²; lists of (..., columns)."""
    parts = []
    for found, wanted in zip(values, expected, strict=True):
        size = wanted.double().square().sum(-1)
        error = (found.double() - wanted.double()).square().sum(-1)
        parts.append((error / size.clamp_min(torch.finfo(torch.float64).tiny)).flatten())
    return float(torch.cat(parts).mean())


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


def _sample(model: StreamedModel, windows: Tensor, options: CompareOptions) -> Batch:
    """Windows spread over the text, `sample_tokens` of them or one window, as one batch."""
    n = min(len(windows), max(1, options.sample_tokens // windows.shape[1]))
    rows = torch.linspace(0, len(windows) - 1, n).round().long()
    (batch,) = model.embed(windows[rows], n * windows.shape[1])
    return batch


class _Swap:
    """The reference's layer with one of the model's tensors at a time."""

    def __init__(
        self, base: _Stream, stream: _Stream, layer: nn.Module, other: nn.Module, bid: int
    ) -> None:
        self.base, self.stream, self.bid = base, stream, bid
        self.layer, self.other = layer, other
        self.theirs = {t.name: t for t in stream.spec.tensors if t.bid == bid}
        self.matrices = [t for t in base.spec.tensors if t.bid == bid and len(t.shape) > 1]

    def errors(self, sample: Batch, expected: Tensor) -> Iterator[TensorError]:
        """The error of each matrix; none where the two layers are not made of the same tensors."""
        if any(t.name not in self.theirs for t in self.matrices):
            return
        for tensor in self.matrices:
            with self._swapped(tensor) as used:
                if used:
                    made = self.base.model.peek(self.layer, self.bid, sample)
                    yield TensorError(tensor.name, self.bid, nmse([made], [expected]))

    @contextmanager
    def _swapped(self, tensor: TensorSpec) -> Iterator[bool]:
        """Whether the layer uses `tensor`; if so, it has the model's for as long as this lasts."""
        model = self.base.model
        parameter = model.names.parameter(tensor.sources[0])
        if parameter is None:
            yield False
            return
        place = self.layer.get_parameter(parameter.removeprefix(f"{model.layers_path}.{self.bid}."))
        kept = place.data
        place.data = self._mixed(tensor, parameter)
        try:
            yield True
        finally:
            place.data = kept

    def _mixed(self, tensor: TensorSpec, parameter: str) -> Tensor:
        """The parameter with what `tensor` contributes taken from the model."""
        base, other = self.base.model, self.stream.model
        if set(base.names.parts(parameter)) <= set(tensor.sources):
            theirs = other.names.parameter(self.theirs[tensor.name].sources[0])
            assert theirs is not None
            return self.other.get_parameter(
                theirs.removeprefix(f"{other.layers_path}.{self.bid}.")
            ).data
        names = dict(zip(tensor.sources, self.theirs[tensor.name].sources, strict=True))

        def read(name: str) -> Tensor:
            if name in names:
                return other.source.read(names[name])
            return base.source.read(name)

        return base.names.assemble(parameter, base.dtype, base.device, read)[parameter]


@torch.inference_mode()
def _output_error(base: StreamedModel, other: StreamedModel, sample: Batch) -> list[TensorError]:
    """The error that the output matrix alone puts into the logits."""
    normed = base.final_norm(sample.hidden.flatten(0, 1)).cpu()
    sums = torch.zeros(4, len(normed), dtype=torch.float64)  # Σa, Σa², Σe, Σe² with e = b - a
    for (first, _, a32), (_, _, b32) in zip(base.logits(normed), other.logits(normed), strict=True):
        a, e = a32.double(), b32.double() - a32.double()
        rows = torch.stack([a.sum(-1), a.square().sum(-1), e.sum(-1), e.square().sum(-1)])
        sums[:, first : first + len(a)] += rows.cpu()
    n = base.spec.vocab_size
    power = (sums[1] - sums[0].square() / n).clamp_min(torch.finfo(torch.float64).tiny)
    error = (sums[3] - sums[2].square() / n).clamp_min(0.0)
    tied = other.spec.tied_embeddings
    name = "token_embd.weight (as output)" if tied else "output.weight"
    return [TensorError(name, None, float((error / power).mean()))]


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
        progress("logits", number, len(streams))
