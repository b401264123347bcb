"""An evaluation by the llama.cpp engine: what llama-perplexity is given, and what it gave.

Owns: writing out the text and the reference in the temporary folder, and putting the statistics
into a row. Leaves out: running the tool (`llama_engine`).
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moequant.calibrate.forward import Progress
from moequant.checkpoint import Checkpoint
from moequant.errors import UsageError
from moequant.evaluate.llama_engine import LlamaOptions, llama_statistics
from moequant.evaluate.models import MeasuredModel
from moequant.evaluate.result import Row
from moequant.evaluate.statistics import Estimate
from moequant.evaluate.text import TextOptions, documents_of
from moequant.expert_banks import read_banks
from moequant.gguf_file import GGUFFile
from moequant.runtime.llama_cpp import ensure_built

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
    """Hold `file` against `base` on as many windows as `windows` (n, length) has.

    Raises:
        UsageError: a file with expert banks, or conversations.
        CalibrationError, LlamaCppError: as `llama_statistics`.
    """
    _check(file, base)
    llama_cpp = ensure_built(("llama-perplexity",))
    documents = documents_of(run.text)
    if any(document.messages for document in documents):
        raise UsageError("--engine llama.cpp takes plain text only, no conversations.")
    path = file.origin.path
    with tempfile.TemporaryDirectory(prefix="moequant-") as folder:
        text = Path(folder) / "text.txt"
        text.write_text("".join(document.text for document in documents), "utf-8")
        whole = Path(folder) / "reference.gguf"
        if isinstance(base.origin, Checkpoint):
            lossless(base.origin, whole, progress)
        else:
            whole = base.origin.path
        given = LlamaOptions(len(windows), windows.shape[1], run.threads, run.gpu_layers)
        found = llama_statistics(llama_cpp, whole, path, text, given, progress)
    row = Row(file.name, file.nbytes, file.bpw, found.perplexity, found.ppl_ratio, found.kld,
              found.top1, found.delta_p_mean, found.delta_p_rms)  # fmt: skip
    return LlamaFound(row, found.reference_perplexity, len(windows))


def _check(file: MeasuredModel, base: MeasuredModel) -> None:
    if any(
        read_banks(model.origin) for model in (file, base) if isinstance(model.origin, GGUFFile)
    ):
        raise UsageError(
            f"--engine llama.cpp: {file.origin.path} or its reference keeps experts in banks, "
            "which stock llama.cpp does not run; use --engine moequant."
        )
