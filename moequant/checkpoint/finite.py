"""NaN and Inf in weights.

Owns: counting them, and the error for a checkpoint. Leaves out: when to check (whoever reads a
weight to pack or to run it does), and the error for a GGUF file (`evaluate.gguf_weights`).
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from moequant.errors import CheckpointError

_CHUNK = 1 << 20  # elements; bounds the temporaries to a few MB whatever the tensor's size


def check_finite(name: str, tensor: torch.Tensor, file: Path | None = None) -> None:
    """Raise `CheckpointError` if `tensor` (any shape, any dtype) holds NaN or Inf.

    The message names `file` if given, the tensor, how many of each, and among how many values.
    Integers, bool and F4 cannot hold either and pass unread.
    """
    counts = not_finite(tensor)
    if counts:
        where = f"{file.name}: " if file else ""
        raise CheckpointError(
            f"{where}{name} has {counts} among {tensor.numel()} values. A GGUF file made from it "
            "would compute NaN; download the file again, or repair the checkpoint at its source."
        )


def not_finite(tensor: torch.Tensor) -> str:
    """How many of each `tensor` (any shape, any dtype) holds: "3 NaN and 2 Inf"; "" for none."""
    nan = inf = 0
    for chunk in _float_chunks(tensor):
        # torch's aminmax propagates NaN, so finite extremes prove all values finite: one fast pass.
        if not all(bool(extreme.isfinite()) for extreme in chunk.aminmax()):
            nan += int(chunk.isnan().sum())
            inf += int(chunk.isinf().sum())
    return " and ".join(f"{n} {word}" for n, word in ((nan, "NaN"), (inf, "Inf")) if n)


def _float_chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Flat pieces of at most `_CHUNK` values; 8-bit ones as float32, which torch can reduce."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or "float4" in str(tensor.dtype) or tensor.numel() == 0:
        return
    flat = tensor.detach().reshape(-1)
    for begin in range(0, flat.numel(), _CHUNK):
        chunk = flat[begin : begin + _CHUNK]
        yield chunk.float() if chunk.element_size() == 1 else chunk
