"""Bytes and bits of GGUF types, for the planner.

Owns: sums over shapes. Leaves out: the table of types (`moequant.qtypes`).
"""

import math

from moequant.qtypes import QUANT_TYPES

QTYPES: tuple[str, ...] = tuple(QUANT_TYPES)


def block_size(qtype: str) -> int:
    """Values per block; KeyError for a type that is not in QTYPES."""
    return QUANT_TYPES[qtype].block_size


def bpw(qtype: str) -> float:
    """Bits per weight of a type, block scales included."""
    return QUANT_TYPES[qtype].bpw


def fits(qtype: str, cols: int) -> bool:
    """Whether a row of `cols` values can be cut into blocks of this type."""
    return cols % block_size(qtype) == 0


def tensor_bytes(qtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's data; only for rows that fit."""
    layout = QUANT_TYPES[qtype]
    return math.prod(shape) // layout.block_size * layout.type_size
