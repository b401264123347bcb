"""Perplexity and KL divergence by llama-perplexity, of two GGUF files.

Owns: running the tool twice (the reference writes its predictions, the file is held against them),
checking that the first run was whole, and reading the statistics of the second. Leaves out: running
the tool (`runtime.perplexity_tool`), and everything by layer: the tool shows predictions only.
"""

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moequant.calibrate.forward import Progress
from moequant.errors import CalibrationError, ExportError, LlamaCppError
from moequant.evaluate.logits_file import LogitsHeader, logits_bytes, read_header
from moequant.evaluate.result import KLD
from moequant.evaluate.statistics import Estimate
from moequant.runtime.llama_cpp import LlamaCpp
from moequant.runtime.perplexity_tool import EXACT, complaints, run_perplexity

TOO_SHORT = "you need at least"  # what the tool says, with exit code 0
_NUMBER = r"(-?[\d.]+|-?nan|-?inf)"
_STATISTIC = re.compile(rf"^(\S.*?) *: +{_NUMBER}(?: ± +{_NUMBER})?(?: ?%)?$", re.MULTILINE)


@dataclass(frozen=True)
class LlamaOptions:
    """`windows` of `length` tokens are run; None for what the tool chooses itself.

    `text_name` is what the errors call the text, and `folder` where the predictions are kept.
    """

    windows: int
    text_name: str
    folder: Path
    length: int = 512
    threads: int | None = None
    gpu_layers: int | None = None


@dataclass(frozen=True)
class LlamaStatistics:
    """What llama-perplexity printed, probabilities as shares, not in percent; and what it ran.

    `tokens`: int32 (windows, length), the text as the tool tokenized it.
    """

    reference_perplexity: Estimate
    perplexity: Estimate
    ppl_ratio: Estimate
    kld: KLD
    top1: Estimate
    delta_p_mean: Estimate
    delta_p_rms: Estimate
    tokens: npt.NDArray[np.int32]


def llama_statistics(
    llama_cpp: LlamaCpp,
    reference: Path,
    file: Path,
    text: Path,
    options: LlamaOptions,
    progress: Progress = lambda *_: None,
) -> LlamaStatistics:
    """Hold the GGUF `file` against the GGUF `reference` on the first windows of `text`.

    Raises:
        CalibrationError: the text is shorter than two windows of llama.cpp's tokens.
        ExportError: the reference's predictions were not written whole.
        LlamaCppError: the tool failed (with what it said), or gave no whole result.
    """
    logits = options.folder / "logits"
    progress("llama.cpp", 0, 2)
    said = run_perplexity(llama_cpp, _arguments(reference, text, logits, options))
    header = _whole(logits, said, reference, options)
    progress("llama.cpp", 1, 2)
    arguments = [*_arguments(file, text, logits, options), "--kl-divergence"]
    said = run_perplexity(llama_cpp, arguments)
    progress("llama.cpp", 2, 2)
    return _read(said, file, header)


def _arguments(model: Path, text: Path, logits: Path, options: LlamaOptions) -> list[str]:
    size = str(options.length)
    arguments = ["-m", str(model), "-f", str(text), "-c", size, "-b", size, "--chunks",
                 str(options.windows), "--kl-divergence-base", str(logits), *EXACT]  # fmt: skip
    if options.threads is not None:
        arguments += ["-t", str(options.threads)]
    if options.gpu_layers is not None:
        arguments += ["-ngl", str(options.gpu_layers)]
    return arguments


def _whole(logits: Path, said: str, reference: Path, options: LlamaOptions) -> LogitsHeader:
    """The header of the predictions, which have the size that it implies."""
    if TOO_SHORT in said:
        raise CalibrationError(
            f"{options.text_name} is too short for llama-perplexity, which needs two windows of "
            f"{options.length} of its own tokens: give a longer text, or a smaller --context.\n"
            + complaints(said)
        )
    header = read_header(logits)
    size = logits.stat().st_size if logits.is_file() else 0
    needed = logits_bytes(options.windows, options.length, 0)
    if header is not None:
        needed = logits_bytes(header.windows, header.length, header.vocabulary)
        if size == needed:
            return header
    raise ExportError(
        f"llama-perplexity wrote {size} bytes of the predictions of {reference}, and "
        f"{'' if header else 'more than '}{needed} belong there; {options.folder} has "
        f"{shutil.disk_usage(options.folder).free} bytes free. If the disk was full, set TMPDIR to "
        f"a folder on a larger one, or measure fewer --tokens. The tool said:\n{complaints(said)}"
    )


def _read(said: str, file: Path, header: LogitsHeader) -> LlamaStatistics:
    found = {" ".join(label.split()): (value, error)
             for label, value, error in _STATISTIC.findall(said)}  # fmt: skip

    def value(label: str) -> float:
        if label not in found:
            raise LlamaCppError(
                f"llama-perplexity printed no {label!r} for {file}. It said:\n{complaints(said)}"
            )
        number = float(found[label][0])
        if not math.isfinite(number):
            raise LlamaCppError(
                f"llama-perplexity gives {number} as {label!r} for {file}: the forward pass of the "
                "file or of its reference breaks in llama.cpp. Measure with --engine moequant, "
                "whose errors name the layer."
            )
        return number

    def estimate(label: str, unit: float = 1.0) -> Estimate:
        error = float(found[label][1] or "nan") if label in found else math.nan
        # NaN: the root of a variance that is 0 but for rounding. The tool takes tokens as
        # independent, so there is one error only
        error = 0.0 if math.isnan(error) else unit * error
        return Estimate(unit * value(label), error, error)

    return LlamaStatistics(
        reference_perplexity=estimate("Mean PPL(base)"),
        perplexity=estimate("Mean PPL(Q)"),
        ppl_ratio=estimate("Mean PPL(Q)/PPL(base)"),
        kld=KLD(estimate("Mean KLD"), value("Minimum KLD"), value("Median KLD"),
                value("90.0% KLD"), value("95.0% KLD"), value("99.0% KLD"), value("99.9% KLD"),
                value("Maximum KLD")),
        top1=estimate("Same top p", 0.01),
        delta_p_mean=estimate("Mean Δp", 0.01),
        delta_p_rms=estimate("RMS Δp", 0.01),
        tokens=header.tokens,
    )  # fmt: skip
