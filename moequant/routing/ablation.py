"""What experts are worth: perplexity with fewer of them, and with none.

Owns: running variants of a model beside it, layer by layer, and comparing their perplexities.
Leaves out: the forward (`calibrate.forward`), and what perplexity is (`evaluate.perplexity`).

"top-j" is what the model does when its own configuration says j experts per token: the router's
attribute is set, so that gates are normalised again where the family does so. "off" is top-0: no
expert is chosen, the experts' branch is zeros, and so it is after its norm, so that the layer keeps
its dense branch alone. It exists only where there is one (additive models). From the first layer
with experts on each variant has hidden states of its own; a layer is loaded once for all of them.

Errors are over windows, whose tokens are alike, and within texts: texts are chosen, not drawn, and
what they differ by is no error (stratified sampling; Cochran, "Sampling Techniques", 1977, ch. 5).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter

from torch import Tensor, nn

from moequant.calibrate.forward import Batch, StreamedModel, fork
from moequant.calibrate.near_miss import RouterOutput
from moequant.calibrate.run import check_output
from moequant.evaluate.perplexity import score
from moequant.evaluate.statistics import Estimate, exponential, mean

OFF = "off"


@dataclass(frozen=True)
class Ablated:
    """Perplexity of a variant, and nll - nll of the whole model per scored token.

    `name`: "off" or "top-j". `experts`: how many per token. `by_text`: the perplexity of each
    text. `delta_nll` in nats, with the paired error: the tokens are the same, so this tells two
    variants apart when `perplexity`'s own errors do not.
    """

    name: str
    experts: int
    perplexity: Estimate
    by_text: dict[str, float]
    delta_nll: Estimate


class Variants:
    """The batches of each variant of a model, on their way through its layers.

    `tops`: experts per token of each, 0 = off. The one that equals `used` is the model itself, and
    is run by whoever runs the model.
    """

    def __init__(self, row: RouterOutput, tops: Sequence[int], used: int) -> None:
        """Nothing runs until the first layer with experts."""
        self._row = row
        self.tops = tuple(tops)
        self._used = used
        self._batches: dict[int, list[Batch]] = {}

    def fork(self, batches: list[Batch]) -> None:
        """Begin where `batches` stand: before the first layer with experts."""
        self._batches = {
            top: [fork(batch) for batch in batches] for top in self.tops if top != self._used
        }

    def run_layer(self, model: StreamedModel, layer: nn.Module, bid: int, *, moe: bool) -> None:
        """Advance all variants through layer `bid`; `moe`: it has experts.

        Raises CalibrationError for activations that are not finite.
        """
        for top, batches in self._batches.items():
            with choosing(layer, self._row, top) if moe else _as_it_is():
                for batch in batches:
                    model.run_layer(layer, bid, batch)
            check_output(bid, batches)

    def scores(
        self, model: StreamedModel, whole: list[Batch], windows: Tensor, texts: dict[str, int]
    ) -> list[Ablated]:
        """Perplexities, ascending; `whole` are the model's own batches, after the last layer.

        `texts`: how many of `windows` each text has, in order. The output matrix is read once.
        """
        batches = self._batches | {self._used: whole}
        every = chain.from_iterable(batches[top] for top in self.tops)
        found = score(model, every, windows.repeat(len(self.tops), 1))
        losses = dict(zip(self.tops, found.nll.chunk(len(self.tops)), strict=True))
        return [_ablated(top, losses[top], losses[self._used], texts) for top in self.tops]


def _ablated(top: int, nll: Tensor, whole: Tensor, texts: dict[str, int]) -> Ablated:
    numbers = list(texts.values())
    parts = _means(nll, numbers)
    return Ablated(
        name=f"top-{top}" if top else OFF,
        experts=top,
        perplexity=exponential(mean_of_texts(nll, numbers)),
        by_text={name: exponential(found).value for name, found in zip(texts, parts, strict=True)},
        delta_nll=mean_of_texts(nll - whole, numbers),
    )


def mean_of_texts(values: Tensor, numbers: Sequence[int]) -> Estimate:
    """The mean of float64 (tokens,), of texts with `numbers` of windows each, in their order.

    With W_t windows in text t of W, and e_t the error of its mean, error² = Σ (W_t / W · e_t)². A
    text of one window has no such error; then all windows count as one text's, and the error is
    too large rather than too small.
    """
    windows = sum(numbers)
    whole = mean(values, windows)
    if min(numbers) < 2:
        return whole
    parts = _means(values, numbers)
    errors = (n / windows * part.stderr for n, part in zip(numbers, parts, strict=True))
    return Estimate(whole.value, math.hypot(*errors), whole.token_stderr)


def _means(values: Tensor, numbers: Sequence[int]) -> list[Estimate]:
    """The mean of each text, of (tokens,) and windows as above."""
    per_window = len(values) // sum(numbers)
    parts = values.split([n * per_window for n in numbers])
    return [mean(part, n) for part, n in zip(parts, numbers, strict=True)]


@contextmanager
def choosing(layer: nn.Module, row: RouterOutput, top: int) -> Iterator[None]:
    """`layer` with a router that chooses `top` experts; as it was afterwards."""
    path, _, name = row.top_k.rpartition(".")
    router = layer.get_submodule(row.module)
    holder = attrgetter(path)(router) if path else router
    before = getattr(holder, name)
    setattr(holder, name, top)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield
