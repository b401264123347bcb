"""Quantize and dequantize rows: GGUF's block formats, on CPU or CUDA.

Owns: the public functions, the checks of what comes in, cutting the work into chunks, threads.
Leaves out: the layouts (`moequant.qtypes`); decoders and encoders in torch, for CUDA (`blocks`,
`legacy`, `k_asymmetric`, `k_symmetric`, `nonlinear`); the compiled encoders, for the CPU
(`compiled`, `compiled_*`).

Bytes depend on the values and the importance alone: not on the number of threads, the chunks, or
which other rows come along.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moequant.qtypes import QUANT_TYPES, QuantType
from moequant.quants import k_asymmetric, k_symmetric, legacy, nonlinear
from moequant.quants.blocks import Codec

if TYPE_CHECKING:
    from moequant.quants.compiled import Kernel

__all__ = ["CODECS", "QUANT_TYPES", "QuantType", "dequantize", "kernels", "quantize", "row_bytes"]

CODECS: dict[str, Codec] = {
    **legacy.CODECS,
    **k_asymmetric.CODECS,
    **k_symmetric.CODECS,
    **nonlinear.CODECS,
}

CPU_CHUNK = 1 << 17  # values: large enough to hide torch's overhead, small enough for the cache
GPU_CHUNK = 1 << 24
COMPILED_CHUNK = 1 << 18  # about ten milliseconds: Ctrl-C and idle workers wait no longer

COMPILED_MODULES = ("compiled_k_asymmetric", "compiled_legacy", "compiled_symmetric")


def row_bytes(qtype: str, cols: int) -> int:
    """Bytes of one row of `cols` values; ValueError if they cannot be cut into blocks."""
    return _layout(qtype).row_bytes(cols)


def quantize(
    x: Tensor,
    qtype: str,
    importance: Tensor | None = None,
    *,
    threads: int | None = None,
    chunk_values: int | None = None,
    compiled: bool | None = None,
) -> Tensor:
    """Encode rows so that sum_j importance_j (x_j - x̂_j)² is small.

    x: float32 [rows, cols], finite. importance: float32 [cols], finite, >= 0, one row that serves
    all rows of x (one expert); None counts every column alike. Returns uint8 [rows, row_bytes] on
    x's device. On the CPU `threads` workers share the work (None: all cores); neither it nor
    `chunk_values` changes a byte. On the CPU the compiled encoder does it where the type has one;
    `compiled=False` takes torch, as on CUDA, whose bytes may differ; True insists on compiled.

    ValueError: unknown qtype, cols not a multiple of the block size, wrong dtype or shape,
    NaN or Inf, negative importance, or values too large for the type's fp16 scales. (ggml
    stores infinite scales for the last, which decode to NaN.)
    """
    layout, codec = _layout(qtype), CODECS[qtype]
    _check_values(x, layout, codec)
    weights = None
    if importance is not None:
        importance = _checked_importance(importance, x)
        weights = _normalised(importance, layout) if codec.weighted else None
    blocks = x.reshape(-1, layout.block_size)
    out = torch.empty(len(blocks), layout.type_size, dtype=torch.uint8, device=x.device)
    kernel = None if compiled is False or x.is_cuda else kernels().get(qtype)
    if kernel is not None:
        _run_kernel(kernel, blocks, weights, out, threads, chunk_values)
    elif compiled:
        raise ValueError(f"no compiled encoder of {qtype} on {x.device}")
    else:
        chunk = _chunk_blocks(layout, x.device, chunk_values)
        _fill(out, partial(_encode, codec, blocks, weights), chunk, threads)
    return out.view(x.shape[0], layout.row_bytes(x.shape[1]))


def dequantize(data: Tensor, qtype: str, cols: int, *, threads: int | None = None) -> Tensor:
    """Decode rows: uint8 [rows, row_bytes] to float32 [rows, cols], bit for bit as ggml does.

    ValueError: unknown qtype, or data that is not uint8 [rows, row_bytes(qtype, cols)].
    """
    layout, codec = _layout(qtype), CODECS[qtype]
    expected = layout.row_bytes(cols)
    if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] != expected:
        raise ValueError(
            f"{qtype} rows of {cols} values are uint8 [rows, {expected}]: "
            f"{data.dtype} {list(data.shape)}"
        )
    blocks = data.reshape(-1, layout.type_size)
    out = torch.empty(len(blocks), layout.block_size, dtype=torch.float32, device=data.device)

    def decode(start: int, stop: int) -> Tensor:
        return codec.decode(blocks[start:stop])

    _fill(out, decode, _chunk_blocks(layout, data.device, None), threads)
    return out.view(data.shape[0], cols)


@cache
def kernels() -> "dict[str, Kernel]":
    """Compiled encoders by type. Imports numba, which is why it waits for the first call."""
    found: dict[str, Kernel] = {}
    for name in COMPILED_MODULES:
        found.update(import_module(f"moequant.quants.{name}").KERNELS)
    return found


def _layout(qtype: str) -> QuantType:
    if qtype not in QUANT_TYPES:
        raise ValueError(f"unknown type {qtype!r}; known: {', '.join(QUANT_TYPES)}")
    return QUANT_TYPES[qtype]


def _check_values(x: Tensor, layout: QuantType, codec: Codec) -> None:
    if x.dtype != torch.float32 or x.dim() != 2:
        raise ValueError(f"x must be float32 [rows, cols]: {x.dtype} {list(x.shape)}")
    layout.row_bytes(x.shape[1])
    if x.numel() == 0:
        return
    low, high = (bound.item() for bound in torch.aminmax(x))
    largest = max(-low, high)
    if not math.isfinite(largest):
        raise ValueError(f"x has {int((~x.isfinite()).sum())} NaN or Inf of {x.numel()} values")
    if largest > codec.limit:
        raise ValueError(f"{layout.name} holds |x| up to {codec.limit:g}: {largest:g}")


def _checked_importance(importance: Tensor, x: Tensor) -> Tensor:
    if importance.dtype != torch.float32 or tuple(importance.shape) != (x.shape[1],):
        raise ValueError(
            f"importance must be float32 [{x.shape[1]}], one per column: "
            f"{importance.dtype} {list(importance.shape)}"
        )
    if importance.device != x.device:
        raise ValueError(f"importance is on {importance.device}, x on {x.device}")
    bad = int((~(importance.isfinite() & (importance >= 0))).sum())
    if bad:
        raise ValueError(f"importance has {bad} negative, NaN or Inf of {len(importance)} values")
    return importance


def _normalised(importance: Tensor, layout: QuantType) -> Tensor:
    """[cols/block_size, block_size], each block scaled to a largest value in [1, 2).

    A power of two changes no comparison inside a block, and keeps products of sums inside
    float32. A block of zeros stays zero.
    """
    blocks = importance.reshape(-1, layout.block_size)
    _, exponent = torch.frexp(blocks.amax(dim=1, keepdim=True))
    # In two halves: 2^-exponent itself may be outside float32.
    half = exponent.div(2, rounding_mode="floor")
    return torch.ldexp(torch.ldexp(blocks, -half), half - exponent + 1)


def _encode(codec: Codec, blocks: Tensor, weights: Tensor | None, start: int, stop: int) -> Tensor:
    """Bytes of blocks start..stop, in torch; weights are those of one row, again and again."""
    if weights is not None:
        weights = weights[torch.arange(start, stop, device=weights.device) % len(weights)]
    return codec.encode(blocks[start:stop], weights)


def _run_kernel(
    kernel: "Kernel",
    blocks: Tensor,
    weights: Tensor | None,
    out: Tensor,
    threads: int | None,
    chunk_values: int | None,
) -> None:
    """Encode blocks into out, chunk by chunk."""
    size = blocks.shape[1]
    # Aligned and contiguous whatever came in: another kind of array would compile another kernel.
    x = np.require(blocks.detach().numpy(), np.float32, ["C", "A"])
    importance = np.empty((0, size), np.float32) if weights is None else weights.numpy()
    importance = np.require(importance, np.float32, ["C", "A"])
    data = out.numpy()

    def work(start: int, stop: int) -> None:
        kernel(x[start:stop], importance, start, data[start:stop])

    _share(len(x), max(1, (chunk_values or COMPILED_CHUNK) // size), threads, work)


def _chunk_blocks(layout: QuantType, device: torch.device, values: int | None) -> int:
    if values is None:
        values = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
    return max(1, values // layout.block_size)


def _fill(out: Tensor, part: Callable[[int, int], Tensor], chunk: int, threads: int | None) -> None:
    """out[start:stop] = part(start, stop) over all chunks, on several threads if on the CPU."""

    def work(start: int, stop: int) -> None:
        out[start:stop] = part(start, stop)

    if out.device.type != "cpu":
        _share(len(out), chunk, 1, work)
        return
    # One torch thread per worker: chunks are too small to share among threads. The setting is
    # the worker's own, but also what threads born later start with, hence the last line.
    torch_threads = torch.get_num_threads()
    try:
        _share(len(out), chunk, threads, work, partial(torch.set_num_threads, 1))
    finally:
        torch.set_num_threads(torch_threads)


def _share(
    count: int,
    chunk: int,
    threads: int | None,
    work: Callable[[int, int], None],
    first: Callable[[], None] | None = None,
) -> None:
    """work(start, stop) over chunks of `count`; new threads call `first` before they begin."""
    starts = range(0, count, chunk)
    workers = min(threads or os.cpu_count() or 1, len(starts))
    if workers < 2 and (first is None or len(starts) < 2):
        for start in starts:
            work(start, min(start + chunk, count))
        return
    stops = [min(start + chunk, count) for start in starts]
    with ThreadPoolExecutor(workers, initializer=first) as pool:
        for _ in pool.map(work, starts, stops):
            pass
