"""The evaluation: a file held against a reference, by our engine or by llama.cpp's.

Owns: the order of things, and which options go together. Leaves out: each of them.
"""

from dataclasses import dataclass, field
from pathlib import Path

from moequant.calibrate.forward import Progress
from moequant.checkpoint import Checkpoint
from moequant.errors import UsageError
from moequant.evaluate.baseline import BaselineWeights
from moequant.evaluate.compare import CompareOptions, Measurement, compare
from moequant.evaluate.gguf_tokenizer import check_vocabulary, metadata_differences
from moequant.evaluate.llama_run import LlamaRun, Lossless, run_llama_cpp
from moequant.evaluate.models import MeasuredModel, check_same_model, open_file, open_reference
from moequant.evaluate.result import Evaluation, Row, rows_of
from moequant.evaluate.statistics import Estimate
from moequant.evaluate.text import TextOptions, text_windows
from moequant.evaluation_options import LLAMA_CPP, OURS


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
    _check_context(options.text.length, base)
    models = [file, *(_baseline(base, kind) for kind in dict.fromkeys(options.baselines))]
    windows = text_windows(base, options.text, from_start=options.engine == LLAMA_CPP)
    if options.engine == LLAMA_CPP:
        given = LlamaRun(options.text, options.threads, options.gpu_layers)
        ran = run_llama_cpp(file, base, windows, given, lossless, progress)
        return _evaluation(file, base, ran.windows, options, ran.reference, (ran.row,), ran.notes)
    found = compare(base, models, windows, options.compare, progress)
    divergence = found[0].divergence
    assert divergence is not None
    expected = divergence.reference_perplexity
    notes = _unmeasured(found[0], options)
    return _evaluation(file, base, len(windows), options, expected, rows_of(found), notes)


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


def _check_context(length: int, base: MeasuredModel) -> None:
    if length > base.spec.context_length:
        raise UsageError(
            f"--context {length}: {base.name} was made for {base.spec.context_length} tokens at "
            "most; use no more."
        )


def _unmeasured(measured: Measurement, options: EvaluateOptions) -> tuple[str, ...]:
    """A note where tensor errors were asked for and could not be measured."""
    if measured.tensors or not options.compare.sample_tokens:
        return ()
    return (
        "errors of single tensors were not measured: file and reference are not made of the same "
        "tensors",
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


def _evaluation(
    file: MeasuredModel,
    base: MeasuredModel,
    windows: int,
    options: EvaluateOptions,
    expected: Estimate,
    rows: tuple[Row, ...],
    notes: tuple[str, ...] = (),
) -> Evaluation:
    length = options.text.length
    return Evaluation(
        file=str(file.origin.path),
        reference=base.name,
        engine=options.engine,
        text=options.text.name,
        chat=options.text.chat,
        windows=windows,
        length=length,
        tokens_scored=windows * (length - 1 - length // 2),
        reference_perplexity=expected,
        rows=rows,
        notes=(*metadata_differences(file.origin, base.origin), *notes),
    )
