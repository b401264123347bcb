"""The type that llama.cpp's converter gives a tensor in a file of one type throughout.

Owns: the rule, pure and without torch. Leaves out: what llama-quantize does (`moequant.plan`).
Source: `prepare_tensors` of llama.cpp's `conversion/base.py`.
"""

import re
from typing import Protocol

# Matrices that stay F32 because the graph adds to or compares with what they give.
ALWAYS_F32 = frozenset({"ffn_gate_inp", "ffn_gate_inp_shexp"})
_BLOCK = re.compile(r"blk\.\d+\.")


class NamedShape(Protocol):
    """A GGUF name and a shape in torch order; `TensorSpec` is one."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def converter_type(tensor: NamedShape, base: str) -> str:
    """`base` ("F32", "F16" or "BF16"), or "F32" where the converter always writes that.

    Vectors, norms, routers and everything whose name does not end in `.weight` are F32.
    """
    role = _BLOCK.sub("", tensor.name, count=1).removesuffix(".weight")
    keeps = (
        len(tensor.shape) <= 1
        or tensor.name.endswith("_norm.weight")
        or not tensor.name.endswith(".weight")
        or role in ALWAYS_F32
    )
    return "F32" if keeps else base
