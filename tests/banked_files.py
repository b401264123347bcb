"""Files with expert banks, made of ordinary ones with gguf-py's writer and quantizers.

Owns: splitting the experts of a file's stacks into banks. The pattern is fixed: expert e goes to
bank e % n, and its place in the bank is reversed, so that nothing works by order alone.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from tests.gguf_files import Value, rewrite

Q8_0, I32 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.I32


def bank_tensors(
    tensor: Any, types: tuple[GGMLQuantizationType | None, ...]
) -> dict[str, Value | None]:
    """The tensors that replace the stack `tensor`; None in `types` keeps the stack's own type."""
    stem = tensor.name.removesuffix(".weight")
    experts, n_banks = len(tensor.data), len(types)
    table = np.full((n_banks, experts), -1, np.int32)
    made: dict[str, Value | None] = {tensor.name: None}
    for bank, qtype in enumerate(types):
        chosen = list(range(experts))[bank::n_banks][::-1]
        table[bank, chosen] = range(len(chosen))
        values = tensor.data[chosen]
        if qtype is not None:
            values = gguf.quantize(gguf.dequantize(values, tensor.tensor_type), qtype)
        made[f"{stem}.bank{bank}.weight"] = (values, qtype or tensor.tensor_type)
    made[f"{stem}.bank_map"] = (table, I32)
    return made


def banked(
    source: Path,
    target: Path,
    types: tuple[GGMLQuantizationType | None, ...] = (None, Q8_0),
    *,
    change: Any = lambda tensors: None,
    version: int | None = 1,
    count: int | None = None,
) -> dict[str, Value | None]:
    """Write `source` to `target` with all experts in banks of `types`; gives what was replaced.

    `change` may damage the tensors before they are written.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    tensors: dict[str, Value | None] = {}
    for tensor in reader.tensors:
        if tensor.name.endswith("_exps.weight"):
            tensors |= bank_tensors(tensor, types)
    change(tensors)
    count = len(types) if count is None else count
    keys = {f"{architecture}.expert_bank_version": version,
            f"{architecture}.expert_bank_count": count}  # fmt: skip
    rewrite(source, target, tensors=tensors, keys=keys)
    return tensors
