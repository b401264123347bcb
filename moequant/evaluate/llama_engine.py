"""Perplexity and KL divergence by llama-perplexity, of two GGUF files.

Owns: running the tool twice (the reference writes its logits, the file is held against them) and
reading its statistics. Leaves out: building the tool (`runtime`), and everything by layer: the tool
shows predictions only.

Keys and values in float32 and no flash attention, so that the weights, and the kernels that
multiply them, are all that differs. The tool's logger may be stopped before its last lines, with
exit code 0: a run without them is repeated.
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moequant.calibrate.forward import Progress
from moequant.errors import CalibrationError, LlamaCppError
from moequant.evaluate.result import KLD
from moequant.evaluate.statistics import Estimate
from moequant.runtime.llama_cpp import LlamaCpp

EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")
LEAST_TOKENS = 100  # the tool gives no statistics over fewer scored tokens
ATTEMPTS = 10
LOG_TAIL = 12  # lines of a failed run that the error shows

_NUMBER = r"(-?[\d.]+(?:e[+-]?\d+)?|-?nan|-?inf)"


@dataclass(frozen=True)
class LlamaOptions:
    """`windows` of `length` tokens are run; None for what the tool chooses itself."""

    windows: int
    length: int = 512
    threads: int | None = None
    gpu_layers: int | None = None


@dataclass(frozen=True)
class LlamaStatistics:
    """What llama-perplexity printed; probabilities as shares, not in percent."""

    reference_perplexity: Estimate
    perplexity: Estimate
    ppl_ratio: Estimate
    kld: KLD
    top1: Estimate
    delta_p_mean: Estimate
    delta_p_rms: Estimate


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
        CalibrationError: fewer than 100 tokens would be scored.
        LlamaCppError: the tool failed (with its last lines), or gave no result.
    """
    scored = options.windows * (options.length - 1 - options.length // 2)
    if scored < LEAST_TOKENS:
        raise CalibrationError(
            f"{text} gives {scored} tokens to score, and llama-perplexity needs {LEAST_TOKENS}: "
            "give a longer text."
        )
    with tempfile.TemporaryDirectory(prefix="moequant-") as folder:
        logits = Path(folder) / "logits"
        base = [*_command(llama_cpp, reference, text, options), "--kl-divergence-base", str(logits)]
        progress("llama.cpp", 0, 2)
        _run(base, Path(folder) / "reference.log", "Final estimate")
        progress("llama.cpp", 1, 2)
        model = [*_command(llama_cpp, file, text, options), "--kl-divergence-base", str(logits)]
        found = _run([*model, "--kl-divergence"], Path(folder) / "model.log", "Same top p")
        progress("llama.cpp", 2, 2)
    return _read(found)


def _command(llama_cpp: LlamaCpp, model: Path, text: Path, options: LlamaOptions) -> list[str]:
    size = str(options.length)
    command = [str(llama_cpp.tool("llama-perplexity")), "-m", str(model), "-f", str(text),
               "-c", size, "-b", size, "--chunks", str(options.windows), *EXACT]  # fmt: skip
    if options.threads is not None:
        command += ["-t", str(options.threads)]
    if options.gpu_layers is not None:
        command += ["-ngl", str(options.gpu_layers)]
    return command


def _run(command: Sequence[str], log: Path, last: str) -> str:
    """The tool's output, which is whole if it has the line `last`."""
    for _ in range(ATTEMPTS):
        log.unlink(missing_ok=True)
        run = subprocess.run([*command, "--log-file", str(log)], capture_output=True, check=False)
        logged = log.read_text("utf-8", "replace") if log.is_file() else ""
        output = "\n".join((logged, run.stdout.decode("utf-8", "replace"),
                            run.stderr.decode("utf-8", "replace")))  # fmt: skip
        if run.returncode != 0:
            raise LlamaCppError(
                f"llama-perplexity failed on {command[2]} with exit code {run.returncode}:\n"
                + "\n".join(output.strip().splitlines()[-LOG_TAIL:])
            )
        if last in output:
            return output
    raise LlamaCppError(f"llama-perplexity gave no result for {command[2]} in {ATTEMPTS} runs.")


def _read(output: str) -> LlamaStatistics:
    return LlamaStatistics(
        reference_perplexity=_estimate(output, r"Mean PPL\(base\) +:"),
        perplexity=_estimate(output, r"Mean PPL\(Q\) +:"),
        ppl_ratio=_estimate(output, r"Mean PPL\(Q\)/PPL\(base\) +:"),
        kld=KLD(
            mean=_estimate(output, "Mean +KLD:"),
            min=_value(output, "Minimum KLD:"),
            median=_value(output, "Median +KLD:"),
            p90=_value(output, "90.0% +KLD:"),
            p95=_value(output, "95.0% +KLD:"),
            p99=_value(output, "99.0% +KLD:"),
            p999=_value(output, "99.9% +KLD:"),
            max=_value(output, "Maximum KLD:"),
        ),
        top1=_estimate(output, "Same top p:", 0.01),
        delta_p_mean=_estimate(output, "Mean +Δp:", 0.01),
        delta_p_rms=_estimate(output, "RMS Δp +:", 0.01),
    )


def _value(output: str, label: str) -> float:
    return float(_match(output, rf"{label} +{_NUMBER}")[1])


def _estimate(output: str, label: str, unit: float = 1.0) -> Estimate:
    found = _match(output, rf"{label} +{_NUMBER} ± +{_NUMBER}")
    error = unit * float(found[2])  # the tool takes tokens as independent
    return Estimate(unit * float(found[1]), error, error)


def _match(output: str, pattern: str) -> re.Match[str]:
    found = re.search(pattern, output)
    if found is None:
        raise LlamaCppError(f"llama-perplexity printed nothing like {pattern!r}.")
    return found
