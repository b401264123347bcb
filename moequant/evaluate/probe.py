"""What one layer, or one tensor, of a model adds to the error, on the reference's hidden states.

Owns: three errors on a sample of windows. Leaves out: the run itself (`compare`).

An error is the NMSE of hidden states: |h' - h|² / |h|² of a token, averaged over tokens, so that
the few tokens with huge activations (BOS) do not decide.

    own      after layer N, of the model's layer with the model's per-layer inputs
    tensor   after layer N, of the reference's layer with this one tensor of the model
    outside  of a tensor that layers are given values of (per-layer embeddings): the same, averaged
             over all layers; of the embedding table: in the embeddings; of the output matrix: in
             the logits, each token's less their mean, which softmax does not see

These are local: what later layers make of an error they do not say. On the example model at Q4_K_M
they rank matrices much as the KLD that each alone causes does: rank correlation 0.74
(benchmarks/tensor_errors.py). Norms, scales and other vectors are not measured.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moequant.architectures import TensorSpec
from moequant.calibrate.forward import Batch, StreamedModel
from moequant.calibrate.weights import read_rows
from moequant.errors import CalibrationError

EMBEDDINGS, OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class TensorError:
    """What one tensor of the model alone does; `layer` None outside layers."""

    name: str
    layer: int | None
    nmse: float


def nmse(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Mean over tokens of |values - expected|² / |expected|²; lists of (..., columns)."""
    parts = []
    for found, wanted in zip(values, expected, strict=True):
        size = wanted.double().square().sum(-1)
        error = (found.double() - wanted.double()).square().sum(-1)
        parts.append((error / size.clamp_min(torch.finfo(torch.float64).tiny)).flatten())
    return float(torch.cat(parts).mean())


def check_finite_states(what: str, states: Iterable[Tensor]) -> None:
    """Raise CalibrationError if any of `states`, which are `what`, is not finite."""
    bad = sum(int((~state.isfinite()).sum()) for state in states)
    if bad:
        raise CalibrationError(
            f"{what}: {bad} values are not finite. The weights are damaged, or too large for "
            "--compute-dtype; float32 holds most."
        )


class Sample:
    """Some windows on their way through the reference: `before` a layer, and `after` it.

    The reference's own layer runs once; every error of that layer is measured against `after`.
    """

    def __init__(self, model: StreamedModel, ids: Tensor) -> None:
        """`ids`: token ids (windows, length)."""
        self.model, self.ids = model, ids
        self._batch = self.before = embedded(model, ids)

    @property
    def after(self) -> Tensor:
        """(windows, length, hidden), after the last layer that was run."""
        return self._batch.hidden

    def advance(self, layer: nn.Module, bid: int) -> None:
        """Run the sample through the reference's own layer."""
        self.before = Batch(self._batch.hidden, list(self._batch.calls))
        self.model.run_layer(layer, bid, self._batch)

    def error(self, layer: nn.Module, bid: int, inputs: Batch | None = None) -> float:
        """Of what `layer` makes of the sample before layer `bid`, with `inputs` in place of ours.

        `inputs` gives what a layer is given beside the hidden states (`with_inputs_of`).
        """
        batch = self.before if inputs is None else with_inputs_of(self.before, inputs, bid)
        return nmse([self.model.peek(layer, bid, batch)], [self.after])


class LayerProbe:
    """The errors of another model's layers; it embeds the sample's tokens itself."""

    def __init__(self, sample: Sample, other: StreamedModel) -> None:
        """Embeds the sample; `other` runs no layer."""
        self._sample, self._inputs = sample, embedded(other, sample.ids)

    def own_error(self, other: nn.Module, bid: int) -> float:
        """The error of the other model's layer, after the sample went through the reference's."""
        return self._sample.error(other, bid, self._inputs)


def embedded(model: StreamedModel, sample: Tensor) -> Batch:
    """The sample as one batch before the first layer."""
    (batch,) = model.embed(sample, sample.numel())
    return batch


def with_inputs_of(ours: Batch, theirs: Batch, bid: int) -> Batch:
    """Our hidden states, and what layer `bid` is given beside them from `theirs`.

    What layers hand on to each other (Gemma 4's shared keys and values) stays ours.
    """
    mine, other = ours.calls[bid], theirs.calls[bid]
    assert mine is not None and other is not None
    kept = {name: v for name, v in mine[1].items() if isinstance(v, MutableMapping)}
    calls = list(ours.calls)
    calls[bid] = (other[0], other[1] | kept)
    return Batch(ours.hidden, calls)


class TensorProbe:
    """The errors of single tensors of `other`, collected layer by layer."""

    def __init__(self, sample: Sample, other: StreamedModel) -> None:
        self._sample, self._other = sample, other
        self._found: list[TensorError] = []
        base = sample.model
        theirs = {tensor.name: tensor for tensor in other.spec.tensors}
        wanted = [tensor for tensor in base.spec.tensors if len(tensor.shape) > 1]
        self._theirs = theirs if all(tensor.name in theirs for tensor in wanted) else {}
        self._outside = {
            tensor.name: embedded(
                _with_tensor(base, other, tensor, theirs[tensor.name]), sample.ids
            )
            for tensor in wanted
            if self._theirs and tensor.bid is None and tensor.name not in (EMBEDDINGS, OUTPUT)
        }
        self._sums = dict.fromkeys(self._outside, 0.0)

    def measure(self, layer: nn.Module, other: nn.Module, bid: int) -> None:
        """Take the errors of layer `bid`, if both models are made of the same tensors."""
        if not self._theirs:
            return
        self._found += _Swap(self._sample, self._other, layer, other, bid, self._theirs).errors()
        for name, batch in self._outside.items():
            self._sums[name] += self._sample.error(layer, bid, batch)

    def errors(self, embeddings: float) -> list[TensorError]:
        """All of them, after the last layer; `embeddings` is the error of the embedding table."""
        if not self._theirs:
            return []
        layers = self._other.spec.block_count
        outside = [TensorError(name, None, total / layers) for name, total in self._sums.items()]
        first = TensorError(EMBEDDINGS, None, embeddings)
        last = _output_error(self._sample.model, self._other, self._sample.after)
        return [first, *outside, *self._found, last]


class _MixedSource:
    """The base's weights, but for one tensor, which is the other model's."""

    def __init__(self, base: StreamedModel, other: StreamedModel, names: Mapping[str, str]) -> None:
        self._base, self._other, self._names = base.source, other.source, names

    @property
    def tensors(self) -> Mapping[str, Any]:
        return self._base.tensors

    def read(self, name: str) -> Tensor:
        if name in self._names:
            return self._other.read(self._names[name])
        return self._base.read(name)

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._names:
            return read_rows(self._other, self._names[name], start, stop)
        return read_rows(self._base, name, start, stop)


def _with_tensor(
    base: StreamedModel, other: StreamedModel, tensor: TensorSpec, theirs: TensorSpec
) -> StreamedModel:
    """The base with `tensor` taken from the other model."""
    names = dict(zip(tensor.sources, theirs.sources, strict=True))
    source = _MixedSource(base, other, names)
    return StreamedModel(source, base.spec, device=base.device, dtype=base.dtype)


class _Swap:
    """The reference's layer with one of the model's tensors at a time."""

    def __init__(
        self,
        sample: Sample,
        model: StreamedModel,
        layer: nn.Module,
        other: nn.Module,
        bid: int,
        theirs: Mapping[str, TensorSpec],
    ) -> None:
        self.sample, self.model, self.bid = sample, model, bid
        self.layer, self.other = layer, other
        self.theirs = theirs
        tensors = sample.model.spec.tensors
        self.matrices = [t for t in tensors if t.bid == bid and len(t.shape) > 1]

    def errors(self) -> Iterator[TensorError]:
        """The error of each matrix that the layer uses."""
        for tensor in self.matrices:
            with self._swapped(tensor) as used:
                if used:
                    error = self.sample.error(self.layer, self.bid)
                    yield TensorError(tensor.name, self.bid, error)

    @contextmanager
    def _swapped(self, tensor: TensorSpec) -> Iterator[bool]:
        """Whether the layer uses `tensor`; if so, it has the model's for as long as this lasts."""
        model = self.sample.model
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
        base, other = self.sample.model, self.model
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
def _output_error(base: StreamedModel, other: StreamedModel, hidden: Tensor) -> TensorError:
    """The error that the output matrix alone puts into the logits."""
    normed = base.final_norm(hidden.flatten(0, 1)).cpu()
    sums = torch.zeros(4, len(normed), dtype=torch.float64)  # Σa, Σa², Σe, Σe² with e = b - a
    for (first, _, a32), (_, _, b32) in zip(base.logits(normed), other.logits(normed), strict=True):
        a, e = a32.double(), b32.double() - a32.double()
        rows = torch.stack([a.sum(-1), a.square().sum(-1), e.sum(-1), e.square().sum(-1)])
        sums[:, first : first + len(a)] += rows.cpu()
    n = base.spec.vocab_size
    power = (sums[1] - sums[0].square() / n).clamp_min(torch.finfo(torch.float64).tiny)
    error = (sums[3] - sums[2].square() / n).clamp_min(0.0)
    name = f"{EMBEDDINGS} (as output)" if other.spec.tied_embeddings else OUTPUT
    return TensorError(name, None, float((error / power).mean()))
