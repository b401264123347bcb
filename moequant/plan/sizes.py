"""Bytes and bits of GGUF types, for the planner: names and numbers, no torch.

Owns: which types a plan may name, and their sizes. Leaves out: what is inside a block.

`moequant.quants.layout` holds the same table for the encoders; importing it runs
`moequant.quants`, hence torch, which a planner must not need. Both read gguf's numbers, and a
test keeps the lists equal.
"""

import math

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

_NAMES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
)  # fmt: skip
_SIZES: dict[str, tuple[int, int]] = {
    name: GGML_QUANT_SIZES[GGMLQuantizationType[name]] for name in _NAMES
}
QTYPES: tuple[str, ...] = tuple(_SIZES)


def block_size(qtype: str) -> int:
    """Values per block; KeyError for a type that is not in QTYPES."""
    return _SIZES[qtype][0]


def bpw(qtype: str) -> float:
    """Bits per weight of a type, block scales included."""
    values, size = _SIZES[qtype]
    return 8 * size / values


def fits(qtype: str, cols: int) -> bool:
    """Whether a row of `cols` values can be cut into blocks of this type."""
    return cols % block_size(qtype) == 0


def tensor_bytes(qtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's data; only for rows that fit."""
    values, size = _SIZES[qtype]
    return math.prod(shape) // values * size
