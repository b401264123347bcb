"""The closed family of errors that moequant raises on purpose.

Owns: one base class and one subclass per thing that can be wrong. Every message names the file,
the tensor, the numbers and the remedy, in that order where they exist. Leaves out: printing and
exit codes' use; only `moequant.cli` prints or exits.

`exit_code` is 2 where the user's input or options are at fault, 1 where the work itself failed.
"""

import unicodedata
from collections.abc import Iterable


class MoequantError(Exception):
    """Base of every deliberate error; the message is one to show to a user as it is."""

    exit_code = 1


class UsageError(MoequantError):
    """Options that contradict each other or name something that does not exist."""

    exit_code = 2


class CheckpointError(MoequantError):
    """A checkpoint that is missing, damaged, unsafe (pickle), or not what its config says."""

    exit_code = 2


class ArchitectureError(MoequantError):
    """A model family, or a variant of one, that moequant does not export."""

    exit_code = 2


class TokenizerError(MoequantError):
    """A tokenizer that is missing or cannot be written as GGUF metadata."""

    exit_code = 2


class CalibrationError(MoequantError):
    """Calibration text that is missing, too short or malformed, or a forward pass that broke."""

    exit_code = 2


class ImatrixError(MoequantError):
    """An imatrix file that is damaged or belongs to another model."""

    exit_code = 2


class PlanError(MoequantError):
    """A preset, plan or size that cannot be met for this model."""

    exit_code = 2


class GGUFError(MoequantError):
    """A GGUF file that is damaged or not what was asked for."""

    exit_code = 2


class ExportError(MoequantError):
    """Writing failed: disk full, no permission, or the file read back is not what was packed."""


class OllamaError(MoequantError):
    """An Ollama server that refused a model, broke off, or is none."""


class LlamaCppError(MoequantError):
    """The pinned llama.cpp could not be fetched, verified or built."""


def plain(text: str) -> str:
    """`text` with control characters but line breaks and tabs as escapes: safe on a terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else f"\\x{ord(c):02x}"
                   for c in text)  # fmt: skip


def listing(offenders: Iterable[str], limit: int = 20) -> str:
    """One indented line per offender; past `limit`, the number of those left out."""
    lines = list(offenders)
    shown = [f"\n  - {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"\n  … and {len(lines) - limit} more")
    return "".join(shown)
