"""An evaluation by the llama.cpp engine: what llama-perplexity is given, and what it gave.

Owns: what the engine can take, checked before anything is written; writing out the text and the
reference in the temporary folder; and putting the statistics into a row. Leaves out: running the
tool (`llama_engine`).
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moequant.calibrate.forward import Progress
from moequant.checkpoint import Checkpoint
from moequant.errors import CalibrationError, ExportError, UsageError
from moequant.evaluate.llama_engine import LlamaOptions, llama_statistics
from moequant.evaluate.logits_file import logits_bytes, scored_tokens
from moequant.evaluate.models import MeasuredModel
from moequant.evaluate.result import Row
from moequant.evaluate.statistics import Estimate
from moequant.evaluate.text import TextOptions, documents_of, text_windows
from moequant.expert_banks import has_banks
from moequant.files import check_target
from moequant.gguf_file import GGUFFile
from moequant.runtime.llama_cpp import ensure_built

LEAST_WINDOWS = 2  # llama-perplexity refuses a shorter text, however few windows are asked for
LEAST_SCORED = 100  # and gives no statistics of fewer scored tokens

Lossless = Callable[[Checkpoint, Path, Progress], None]
"""Writes a checkpoint as a GGUF file without loss; what the llama.cpp engine is given."""


@dataclass(frozen=True)
class LlamaRun:
    """What is asked of the engine; None for what the tool chooses itself."""

    text: TextOptions
    threads: int | None = None
    gpu_layers: int | None = None


@dataclass(frozen=True)
class LlamaFound:
    """`reference` is the reference's perplexity; `windows` were run."""

    row: Row
    reference: Estimate
    windows: int
    notes: tuple[str, ...] = ()


def run_llama_cpp(
    file: MeasuredModel,
    base: MeasuredModel,
    windows: Tensor,
    run: LlamaRun,
    lossless: Lossless,
    progress: Progress,
) -> LlamaFound:
    """Hold `file` against `base` on `windows` (n, length), the first of the text.

    Raises:
        UsageError: conversations.
        CalibrationError: a text, or --tokens, too short for llama-perplexity.
        ExportError: the temporary folder has no space for what has to be kept there.
        LlamaCppError: as `llama_statistics`.
    """
    documents = documents_of(run.text)
    if any(document.messages for document in documents):
        raise UsageError("--engine llama.cpp takes plain text only, no conversations.")
    _check_length(base, windows, run.text)
    _check_space(base, windows)
    llama_cpp = ensure_built(
        ("llama-perplexity",), patched=_banked(file) or _banked(base), progress=progress
    )
    with tempfile.TemporaryDirectory(prefix="moequant-") as name:
        folder = Path(name)
        text = folder / "text.txt"
        text.write_text("".join(document.text for document in documents), "utf-8")
        whole = _as_gguf(base, folder / "reference.gguf", lossless, progress)
        given = LlamaOptions(len(windows), run.text.name, folder, windows.shape[1], run.threads,
                             run.gpu_layers)  # fmt: skip
        found = llama_statistics(llama_cpp, whole, file.origin.path, text, given, progress)
    row = Row(file.name, file.nbytes, file.bpw, found.perplexity, found.ppl_ratio, found.kld,
              found.top1, found.delta_p_mean, found.delta_p_rms)  # fmt: skip
    notes = _token_notes(found.tokens, windows)
    return LlamaFound(row, found.reference_perplexity, len(found.tokens), notes)


def _banked(model: MeasuredModel) -> bool:
    """Whether only the patched llama.cpp runs it."""
    return isinstance(model.origin, GGUFFile) and has_banks(model.origin)


def _check_length(base: MeasuredModel, windows: Tensor, text: TextOptions) -> None:
    """CalibrationError unless llama-perplexity gives statistics of `windows`."""
    length = windows.shape[1]
    of_each = scored_tokens(1, length)
    needed = max(LEAST_WINDOWS, -(-LEAST_SCORED // of_each))
    there = len(windows)
    if there < needed:
        there = len(text_windows(base, replace(text, tokens=needed * length), from_start=True))
    if there < LEAST_WINDOWS:
        raise CalibrationError(
            f"{text.name} has fewer than {LEAST_WINDOWS * length} tokens, and llama-perplexity "
            f"needs {LEAST_WINDOWS} windows of {length}: give a longer text, or a smaller "
            "--context."
        )
    scored = scored_tokens(len(windows), length)
    if scored < LEAST_SCORED:
        remedy = "give a longer text"
        if there >= needed:
            remedy = f"use --tokens {needed * length} or more"
        raise CalibrationError(
            f"--engine llama.cpp scores {scored} tokens of {text.name} with --tokens "
            f"{text.tokens} and --context {length}, and llama-perplexity gives no statistics of "
            f"fewer than {LEAST_SCORED}: {remedy}."
        )


def _check_space(base: MeasuredModel, windows: Tensor) -> None:
    """ExportError unless the temporary folder can hold the predictions and the reference."""
    predictions = logits_bytes(len(windows), windows.shape[1], base.spec.vocab_size)
    reference = _lossless_bytes(base) if isinstance(base.origin, Checkpoint) else 0
    scored = scored_tokens(len(windows), windows.shape[1])
    try:
        place = Path(tempfile.gettempdir()) / "moequant-evaluation"
        check_target(place, force=True, needed=predictions + reference)
    except ExportError as error:
        raise ExportError(
            "--engine llama.cpp keeps the reference's predictions "
            f"({predictions / 1e9:.2f} GB for {scored} scored tokens) and the reference itself "
            f"({reference / 1e9:.2f} GB) in the temporary folder: {error} Set TMPDIR to a folder "
            "on a larger disk, or measure fewer --tokens."
        ) from error


def _lossless_bytes(base: MeasuredModel) -> int:
    """About what the checkpoint takes as a GGUF file without loss: 16 bits where all are."""
    assert isinstance(base.origin, Checkpoint)
    matrices = [tensor for tensor in base.spec.tensors if len(tensor.shape) > 1]
    dtypes = {base.origin.tensors[name].dtype for tensor in matrices for name in tensor.sources}
    of_each = 2 if dtypes in ({torch.bfloat16}, {torch.float16}) else 4
    return of_each * sum(prod(tensor.shape) for tensor in matrices)


def _as_gguf(base: MeasuredModel, path: Path, lossless: Lossless, progress: Progress) -> Path:
    """The reference's own file, or the checkpoint written as `path`."""
    if not isinstance(base.origin, Checkpoint):
        return base.origin.path
    lossless(base.origin, path, progress)
    return path


def _token_notes(theirs: npt.NDArray[np.int32], ours: Tensor) -> tuple[str, ...]:
    """A note if llama.cpp read other tokens than `ours` (n, length).

    The first of each window is left out: here it may be BOS, in llama.cpp's file it is not yet.
    """
    n = min(len(theirs), len(ours))
    expected = ours[:n].numpy()
    different = np.argwhere(theirs[:n, 1:] != expected[:, 1:])
    if len(different) == 0:
        return ()
    window, place = (int(index) for index in different[0])
    place += 1
    return (
        "llama.cpp reads the text as other tokens than the checkpoint's tokenizer: first "
        f"difference at token {window * ours.shape[1] + place} ({theirs[window, place]}, not "
        f"{expected[window, place]}). The figures are llama.cpp's, of its own tokens.",
    )
