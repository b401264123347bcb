"""Files with separate gate and up experts, made of fused ones with gguf-py's writer and quantizers.

Owns: cutting each `ffn_gate_up_exps` into `ffn_gate_exps` (the first half of the rows of every
expert) and `ffn_up_exps` (the last). llama.cpp's gemma4 graph takes both forms.
"""

from pathlib import Path
from typing import Any

import gguf
from gguf import GGMLQuantizationType

from tests.gguf_files import Value, rewrite

Types = tuple[GGMLQuantizationType | None, GGMLQuantizationType | None]


def half_tensors(tensor: Any, types: Types) -> dict[str, Value | None]:
    """The tensors that replace the fused `tensor`; None in `types` keeps its own type."""
    middle = tensor.data.shape[1] // 2
    made: dict[str, Value | None] = {tensor.name: None}
    parts = tensor.data[:, :middle], tensor.data[:, middle:]
    for half, data, qtype in zip(("gate", "up"), parts, types, strict=True):
        values = data
        if qtype is not None:
            values = gguf.quantize(gguf.dequantize(data, tensor.tensor_type), qtype)
        name = tensor.name.replace("gate_up", half)
        made[name] = (values.copy(), qtype or tensor.tensor_type)
    return made


def halved(
    source: Path,
    target: Path,
    types: Types = (None, None),
    *,
    change: Any = lambda tensors: None,
) -> dict[str, Value | None]:
    """Write `source` to `target` with gate and up apart; gives what was replaced.

    `change` may damage the tensors before they are written.
    """
    tensors: dict[str, Value | None] = {}
    for tensor in gguf.GGUFReader(source).tensors:
        if ".ffn_gate_up_exps." in tensor.name:
            tensors |= half_tensors(tensor, types)
    assert tensors, f"{source} has no fused experts"
    change(tensors)
    rewrite(source, target, tensors=tensors)
    return tensors
