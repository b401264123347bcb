"""Runs the pinned llama-perplexity and reads its result."""

import math
import re
import subprocess
from pathlib import Path

from moequant.runtime.llama_cpp import LlamaCpp

# float32 keys and values and no flash attention, so that only the weights differ from transformers
EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")


def llama_perplexity(
    llama_cpp: LlamaCpp, model: Path, text: Path, *options: str, context: int = 512
) -> float:
    """PPL of `text`; AssertionError with the log's end if the tool fails or gives none."""
    log = model.with_suffix(".perplexity.log")
    log.unlink(missing_ok=True)
    # the log file, not the pipe: under load the tool may end before its last line is flushed there
    command = [llama_cpp.tool("llama-perplexity"), "-m", model, "-f", text, "-c", str(context),
               "-b", str(context), "-t", "2", "--log-file", log, *EXACT, *options]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    output = log.read_text("utf-8", "replace") + result.stdout + result.stderr
    assert result.returncode == 0, output[-3000:]
    found = re.findall(r"Final estimate: PPL = ([0-9.einfa+-]+)", output)
    if not found:  # seen rarely: the log thread is stopped before the last line
        found = re.findall(r"\[\d+\]([0-9.]+)", output)[-1:]
    assert found, output[-3000:]
    ppl = float(found[0])
    assert math.isfinite(ppl), output[-3000:]
    return ppl
