"""Runs the pinned llama-perplexity and reads its result."""

import math
import re
from pathlib import Path

from moequant.runtime.llama_cpp import LlamaCpp
from moequant.runtime.perplexity_tool import EXACT as EXACT
from moequant.runtime.perplexity_tool import run_perplexity


def llama_perplexity(
    llama_cpp: LlamaCpp, model: Path, text: Path, *options: str, context: int = 512
) -> float:
    """PPL of `text`; AssertionError with the log's end if the tool gives none."""
    return final_estimate(llama_cpp, model, text, *options, context=context)[0]


def final_estimate(
    llama_cpp: LlamaCpp, model: Path, text: Path, *options: str, context: int = 512
) -> tuple[float, float]:
    """PPL of `text` and its error, from the tool's last line: never from a running figure."""
    # One thread: ggml's threads spin while they wait, without end where tests share the cores
    arguments = ["-m", str(model), "-f", str(text), "-c", str(context), "-b", str(context),
                 "-t", "1", *EXACT, *options]  # fmt: skip
    output = run_perplexity(llama_cpp, arguments, timeout=300)
    found = re.search(r"Final estimate: PPL = (\S+) \+/- (\S+)", output)
    assert found, output[-3000:]
    ppl, error = float(found[1]), float(found[2])
    assert math.isfinite(ppl), output[-3000:]
    return ppl, error
