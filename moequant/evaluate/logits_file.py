"""The file in which llama-perplexity keeps a model's predictions.

Owns: its header, and its size. Leaves out: the predictions, which only the tool reads.

Layout: `_logits_`, tokens of a window (uint32), size of the vocabulary and number of windows
(int32), the tokens as they were read (int32), and for each scored token but the last a row of
uint16, of the vocabulary rounded up to even and four more. Source: tools/perplexity/perplexity.cpp
of llama.cpp.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

MAGIC = b"_logits_"
_HEADER = struct.Struct("<8sIii")


@dataclass(frozen=True)
class LogitsHeader:
    """`tokens`: int32 (windows, length), the text as llama.cpp tokenized it, before BOS is put at
    the head of each window."""

    length: int
    vocabulary: int
    tokens: npt.NDArray[np.int32]

    @property
    def windows(self) -> int:
        return len(self.tokens)


def scored_tokens(windows: int, length: int) -> int:
    """How many tokens the tool scores: of each window the second half without its first."""
    return windows * (length - 1 - length // 2)


def logits_bytes(windows: int, length: int, vocabulary: int) -> int:
    """Size of the whole file."""
    row = 2 * (2 * ((vocabulary + 1) // 2) + 4)
    return _HEADER.size + 4 * windows * length + row * scored_tokens(windows, length)


def read_header(path: Path) -> LogitsHeader | None:
    """The header of the file `path`; None if there is none, or less than one of it."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        data = file.read(_HEADER.size)
        if len(data) < _HEADER.size:
            return None
        magic, length, vocabulary, windows = _HEADER.unpack(data)
        tokens = np.fromfile(file, np.int32, windows * length)
    if magic != MAGIC or len(tokens) < windows * length:
        return None
    return LogitsHeader(length, vocabulary, tokens.reshape(windows, length))
