"""The pinned llama-perplexity, run so that no line of its output is lost.

Owns: starting it and its failures. Leaves out: what the output means, and why it is started by
way of `flushed_main`, which says so itself.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from moequant.errors import LlamaCppError
from moequant.runtime.llama_cpp import LlamaCpp

# Keys and values in float32 and no flash attention: the weights, and the kernels that multiply
# them, are all that differs from another implementation.
EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")
LOG_TAIL = 12  # lines of a failed run that the error shows
_COMPLAINT = re.compile(r"fail|error|need at least|inconsistent|unable|unexpected|assert", re.I)


def run_perplexity(
    llama_cpp: LlamaCpp, arguments: Sequence[str], timeout: float | None = None
) -> str:
    """All that llama-perplexity prints, on both streams, when run with `arguments`.

    Raises:
        LlamaCppError: it ended with another exit code than 0; with what it said.
    """
    command = [*tool_command(llama_cpp), *arguments]
    run = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=timeout
    )
    output = run.stdout.decode("utf-8", "replace")
    if run.returncode != 0:
        raise LlamaCppError(
            f"llama-perplexity failed with exit code {run.returncode}:\n{complaints(output)}"
        )
    return output


def tool_command(llama_cpp: LlamaCpp) -> list[str]:
    """What to run in place of the binary."""
    program = Path(__file__).with_name("flushed_main.py")
    libraries = (llama_cpp.library("llama-perplexity-impl"), llama_cpp.library("llama-common"))
    return [sys.executable, "-I", str(program), *map(str, libraries)]


def complaints(output: str) -> str:
    """The lines that say what went wrong, or else the last ones."""
    lines = output.strip().splitlines()
    return "\n".join(([line for line in lines if _COMPLAINT.search(line)] or lines)[-LOG_TAIL:])
