"""What the compiled encoders share: how they are compiled, fp16 fields, weights of a block.

Owns: `jit`, `Kernel`, conversions between float32 and fp16, 16-bit stores. Leaves out: any type's
search or layout (`compiled_*`), chunks and threads (`moequant.quants`).

Floats are strict: no fused multiply-add and no reordered sums, so that a block's bytes depend on
that block and its weights alone. Arithmetic is float32 throughout: constants are `np.float32`,
as a Python float would turn an expression into float64.

Numba keeps machine code next to the module (or in the user's cache, or in NUMBA_CACHE_DIR) and
compiles anew when the module's file changes, but not when one it imports does: after editing this
file in place, delete `moequant/quants/__pycache__`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

# (x float32 [n, block_size], weights float32 [k, block_size], first, out uint8 [n, type_size])
# Block i of x is block `first + i` of its matrix, and has weights[(first + i) % k]; k = 0: none.
Kernel = Callable[[NDArray[np.float32], NDArray[np.float32], int, NDArray[np.uint8]], None]

Function = TypeVar("Function", bound=Callable[..., Any])

ZERO = np.float32(0)
ONE = np.float32(1)
FP16_MAX = np.float32(65504)
FP16_NORMAL = np.float32(2.0**-14)  # the least that has all of its 11 bits
FP16_UNIT = np.float32(2.0**-24)
UNITS_PER_ONE = np.float32(2.0**24)
EXPONENT_OFFSET = 127 - 15  # between the exponent fields of float32 and fp16
TINIEST = np.float32(1e-38)


def jit(function: Function) -> Function:
    """Compile on first call; keep the code on disk; run without the GIL; divide as numpy does."""
    return _compiled(function, inline=False)


def inlined(function: Function) -> Function:
    """`jit` for small functions that the compiler shall always inline."""
    return _compiled(function, inline=True)


def _compiled(function: Function, inline: bool) -> Function:
    compiler = partial(numba.njit, nogil=True, error_model="numpy", forceinline=inline)
    try:
        return cast(Function, compiler(cache=True)(function))
    except RuntimeError:  # nowhere to write: neither next to the module nor in a user's cache
        return cast(Function, compiler(cache=False)(function))


@inlined
def clamp(x: np.float32, low: np.float32, high: np.float32) -> np.float32:
    """x within low..high."""
    return min(max(x, low), high)


@inlined
def safe_inverse(x: np.float32) -> np.float32:
    """1/x, and 0 where x is 0 or so small that 1/x would be infinite."""
    return np.float32(ONE / x) if abs(x) > TINIEST else ZERO


@inlined
def half_bits(x: np.float32) -> np.uint16:
    """Bits of the nearest fp16 (ties to even), saturated at ±65504; a zero is never negative."""
    size = min(abs(x), FP16_MAX)
    if size < FP16_NORMAL:
        bits = np.int64(np.rint(size * UNITS_PER_ONE))
    else:
        whole = np.int64(np.float32(size).view(np.int32))
        whole += 0xFFF + ((whole >> 13) & 1)
        bits = (whole >> 13) - (EXPONENT_OFFSET << 10)
    if x < ZERO and bits > 0:
        bits |= 0x8000
    return np.uint16(bits)


@inlined
def from_half(bits: np.uint16) -> np.float32:
    """What fp16 bits stand for, if finite."""
    size = np.int64(bits) & 0x7FFF
    if size < 0x400:
        value = np.float32(size) * FP16_UNIT
    else:
        value = np.int32((size << 13) + (EXPONENT_OFFSET << 23)).view(np.float32)
    return -value if np.int64(bits) & 0x8000 else value


@inlined
def through_half(x: np.float32) -> np.float32:
    """x rounded to fp16."""
    return from_half(half_bits(x))


@inlined
def store_half(out: NDArray[np.uint8], offset: int, x: np.float32) -> None:
    """Write x as fp16, little-endian, to out[offset:offset + 2]."""
    bits = half_bits(x)
    out[offset] = np.uint8(bits & 0xFF)
    out[offset + 1] = np.uint8(bits >> 8)
