"""Perplexity, as llama-perplexity defines it, through the streamed forward.

Owns: which positions are scored, the loss from logits that come in slices, the tool's estimate.
Leaves out: the forward (`calibrate.forward`), the weights: any source that serves tensors under the
checkpoint's names, so a checkpoint and a quantized file (`gguf_weights`) alike.

Definition (`tools/perplexity/perplexity.cpp`, `perplexity()`): the text is one stream of tokens,
cut into windows of n, the first token of each replaced by BOS where the tokenizer adds one. In
each window positions n/2 to n-2 are scored on the tokens after them, so that every prediction has
context. PPL = exp(mean of the negative log likelihood). `Perplexity.stderr` is the tool's, too, so
that the two compare: PPL times the standard error of that mean, tokens being independent. They are
not, and it is too small; `statistics` has the error over windows.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moequant.architectures import ModelSpec
from moequant.calibrate.forward import Batch, Progress, StreamedModel
from moequant.calibrate.text import read_corpus
from moequant.calibrate.weights import WeightSource
from moequant.calibrate.windows import (
    check_ids,
    cut_windows,
    leading_token,
    load_tokenizer,
    token_stream,
)
from moequant.errors import CalibrationError, UsageError
from moequant.evaluate.divergence import TokenScores


@dataclass(frozen=True)
class Perplexity:
    """`nll`: negative log likelihood of each scored token in nats, float64 (tokens,), by window."""

    nll: Tensor

    @property
    def tokens(self) -> int:
        """How many predictions were scored."""
        return len(self.nll)

    @property
    def ppl(self) -> float:
        """exp of the mean; infinite where that overflows."""
        mean = float(self.nll.mean())
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def stderr(self) -> float:
        """llama-perplexity's standard error of `ppl`: tokens as independent; 0 for a single one."""
        if self.tokens < 2:
            return 0.0
        return self.ppl * float(self.nll.std(correction=0)) / math.sqrt(self.tokens - 1)


def text_windows(
    tokenizer_folder: Path, text: Path, length: int = 512, spec: ModelSpec | None = None
) -> Tensor:
    """Windows (n, length) of the text in `text`, cut as llama-perplexity does.

    With `spec`, windows begin with BOS where the model's family has it so, whatever the tokenizer
    does, and ids are held against its vocabulary. Raises CalibrationError for text that is
    unreadable or shorter than a window and for ids outside the vocabulary, TokenizerError.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    stream = token_stream(tokenizer, read_corpus([text]).documents, spec)
    if len(stream) < length:
        raise CalibrationError(
            f"{text} has {len(stream)} tokens, perplexity is measured on windows of {length}: "
            "give a longer text."
        )
    windows = cut_windows(stream, length, leading_token(tokenizer, spec))
    if spec is not None:
        check_ids(windows, spec)
    return windows


def perplexity(
    source: WeightSource,
    spec: ModelSpec,
    windows: Tensor,
    *,
    score_all: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> Perplexity:
    """Score token ids `windows` (n, length) with the weights of `source`.

    `score_all`: all positions of a window, not its second half only. `dtype`: compute dtype, None
    = the one of the weights. Raises UsageError for windows too short to score anything.
    """
    first_scored(windows, score_all=score_all)
    model = StreamedModel(source, spec, device=device, dtype=dtype)
    batches = model.embed(windows, batch_tokens)
    model.run_layers(batches, progress)
    return score(model, batches, windows, score_all=score_all)


def first_scored(windows: Tensor, *, score_all: bool = False) -> int:
    """The first position of each of `windows` (n, length) that is scored, up to length - 2.

    Raises UsageError for windows too short to score anything.
    """
    length = windows.shape[1]
    first = 0 if score_all else length // 2
    if length - 1 <= first:
        raise UsageError(f"windows of {length} tokens leave nothing to score; use 3 or more")
    return first


def score(
    model: StreamedModel, batches: Iterable[Batch], windows: Tensor, *, score_all: bool = False
) -> Perplexity:
    """Score `windows` (n, length) from `batches` that have been through all layers of `model`."""
    first = first_scored(windows, score_all=score_all)
    scored = (batch.hidden[:, first:-1].flatten(0, 1) for batch in batches)
    normed = torch.cat([model.final_norm(hidden).cpu() for hidden in scored])
    return Perplexity(_losses(model, normed, windows[:, first + 1 :].flatten()))


@torch.inference_mode()
def _losses(model: StreamedModel, normed: Tensor, targets: Tensor) -> Tensor:
    """log Σ exp(logits) - logit of the target for each position, float64, over logits in slices."""
    scores = TokenScores(targets)
    for first, start, logits in model.logits(normed):
        scores.add(slice(first, first + len(logits)), start, logits.double())
    return scores.nll
