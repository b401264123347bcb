"""The evaluation: a file held against a reference, by our engine or by llama.cpp's.

Owns: the order of things, and which options go together. Leaves out: each of them.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from moequant.calibrate.forward import Progress
from moequant.checkpoint import Checkpoint
from moequant.errors import UsageError
from moequant.evaluate.baseline import BaselineWeights
from moequant.evaluate.compare import CompareOptions, compare
from moequant.evaluate.gguf_tokenizer import check_vocabulary, metadata_differences
from moequant.evaluate.llama_engine import LlamaOptions, llama_statistics
from moequant.evaluate.models import MeasuredModel, check_same_model, open_file, open_reference
from moequant.evaluate.result import Evaluation, Row, rows_of
from moequant.evaluate.statistics import Estimate
from moequant.evaluate.text import TextOptions, documents_of, text_windows
from moequant.expert_banks import read_banks
from moequant.gguf_file import GGUFFile
from moequant.runtime.llama_cpp import ensure_built

OURS, LLAMA_CPP = "moequant", "llama.cpp"
ENGINES = (OURS, LLAMA_CPP)

Lossless = Callable[[Checkpoint, Path, Progress], None]
"""Writes a checkpoint as a GGUF file without loss; what the llama.cpp engine is given."""


@dataclass(frozen=True)
class EvaluateOptions:
    """What `moequant evaluate` can be told. `threads` and `gpu_layers` are llama.cpp's."""

    text: TextOptions = field(default_factory=TextOptions)
    compare: CompareOptions = field(default_factory=CompareOptions)
    baselines: tuple[str, ...] = ()
    engine: str = OURS
    threads: int | None = None
    gpu_layers: int | None = None


def evaluate(
    path: Path,
    reference: str,
    options: EvaluateOptions,
    lossless: Lossless,
    progress: Progress = lambda *_: None,
) -> Evaluation:
    """Measure the GGUF file `path` against `reference`, a checkpoint or another GGUF file.

    Raises:
        MoequantError: anything its parts raise; among them GGUFError for a file of another model.
        UsageError: options that the engine or the reference does not take.
    """
    _check(options)
    base = open_reference(reference)
    file = open_file(path)
    check_same_model(file, base)
    check_vocabulary(file.origin, base.origin)
    models = [file, *(_baseline(base, kind) for kind in options.baselines)]
    windows = text_windows(base, options.text)
    if options.engine == LLAMA_CPP:
        return _by_llama_cpp(path, file, base, windows, options, lossless, progress)
    found = compare(base, models, windows, options.compare, progress)
    divergence = found[0].divergence
    assert divergence is not None
    return _evaluation(file, base, windows, options, divergence.reference_perplexity, rows_of(found))


def _check(options: EvaluateOptions) -> None:
    if options.engine == OURS:
        idle = [("--threads", options.threads), ("--gpu-layers", options.gpu_layers)]
        given = [name for name, value in idle if value is not None]
        if given:
            raise UsageError(f"{', '.join(given)}: only for --engine {LLAMA_CPP}.")
        return
    if options.baselines:
        raise UsageError(f"--baseline needs the engine {OURS}: llama.cpp runs GGUF files only.")
    if options.text.chat:
        raise UsageError(
            f"--chat needs the engine {OURS}: llama-perplexity does not read special tokens in "
            "its text."
        )


def _baseline(base: MeasuredModel, kind: str) -> MeasuredModel:
    """bitsandbytes' quantization of the reference's checkpoint."""
    if not isinstance(base.origin, Checkpoint):
        raise UsageError(
            f"--baseline {kind} quantizes a checkpoint, and {base.name} is a GGUF file; name the "
            "checkpoint as --reference."
        )
    weights = BaselineWeights(base.origin, base.spec, kind)
    return MeasuredModel(
        name=f"bitsandbytes {kind}",
        weights=weights,
        spec=base.spec,
        nbytes=weights.size_bytes,
        tokenizer=base.tokenizer,
        qtypes={},
        origin=base.origin,
    )


def _by_llama_cpp(
    path: Path,
    file: MeasuredModel,
    base: MeasuredModel,
    windows: Tensor,
    options: EvaluateOptions,
    lossless: Lossless,
    progress: Progress,
) -> Evaluation:
    if any(
        read_banks(model.origin) for model in (file, base) if isinstance(model.origin, GGUFFile)
    ):
        raise UsageError(
            f"--engine {LLAMA_CPP}: {path} or its reference keeps experts in banks, which stock "
            f"llama.cpp does not run; use --engine {OURS}."
        )
    llama_cpp = ensure_built(("llama-perplexity",))
    documents = documents_of(options.text)
    if any(document.messages for document in documents):
        raise UsageError(f"--engine {LLAMA_CPP} takes plain text only, no conversations.")
    with tempfile.TemporaryDirectory(prefix="moequant-") as folder:
        text = Path(folder) / "text.txt"
        text.write_text("".join(document.text for document in documents), "utf-8")
        whole = Path(folder) / "reference.gguf"
        if isinstance(base.origin, Checkpoint):
            lossless(base.origin, whole, progress)
        else:
            whole = base.origin.path
        given = LlamaOptions(len(windows), windows.shape[1], options.threads, options.gpu_layers)
        found = llama_statistics(llama_cpp, whole, path, text, given, progress)
    row = Row(file.name, file.nbytes, file.bpw, found.perplexity, found.ppl_ratio, found.kld,
              found.top1, found.delta_p_mean, found.delta_p_rms)  # fmt: skip
    return _evaluation(file, base, windows, options, found.reference_perplexity, (row,))


def _evaluation(
    file: MeasuredModel,
    base: MeasuredModel,
    windows: Tensor,
    options: EvaluateOptions,
    expected: Estimate,
    rows: tuple[Row, ...],
) -> Evaluation:
    length = windows.shape[1]
    return Evaluation(
        file=str(file.origin.path),
        reference=base.name,
        engine=options.engine,
        text=options.text.name,
        chat=options.text.chat,
        windows=len(windows),
        length=length,
        tokens_scored=len(windows) * (length - 1 - length // 2),
        reference_perplexity=expected,
        rows=rows,
        notes=tuple(metadata_differences(file.origin, base.origin)),
    )
