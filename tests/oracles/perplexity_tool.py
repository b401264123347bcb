"""Runs the pinned llama-perplexity and reads its result."""

import math
import re
import subprocess
from pathlib import Path

from moequant.runtime.llama_cpp import LlamaCpp

# float32 keys and values and no flash attention, so that only the weights differ from transformers
EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")
ATTEMPTS = (
    12  # the tool's logger may be stopped before its last line, with exit code 0: under load often
)


def llama_perplexity(
    llama_cpp: LlamaCpp, model: Path, text: Path, *options: str, context: int = 512
) -> float:
    """PPL of `text`; AssertionError with the log's end if the tool fails or gives none."""
    return final_estimate(llama_cpp, model, text, *options, context=context)[0]


def final_estimate(
    llama_cpp: LlamaCpp, model: Path, text: Path, *options: str, context: int = 512
) -> tuple[float, float]:
    """PPL of `text` and its error, from the tool's last line: never from a running figure."""
    log = model.with_suffix(".perplexity.log")
    # One thread: ggml's threads spin while they wait, without end where tests share the cores.
    # The log file too, not the pipe alone: which of them gets the last line depends on the load
    command = [llama_cpp.tool("llama-perplexity"), "-m", model, "-f", text, "-c", str(context),
               "-b", str(context), "-t", "1", "--log-file", log, *EXACT, *options]  # fmt: skip
    for _ in range(ATTEMPTS):
        log.unlink(missing_ok=True)
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        logged = log.read_text("utf-8", "replace") if log.is_file() else ""
        output = logged + result.stdout + result.stderr
        assert result.returncode == 0, output[-3000:]
        found = re.search(r"Final estimate: PPL = (\S+) \+/- (\S+)", output)
        if found:
            ppl, error = float(found[1]), float(found[2])
            assert math.isfinite(ppl), output[-3000:]
            return ppl, error
    raise AssertionError(f"no final estimate in {ATTEMPTS} attempts:\n{output[-3000:]}")
