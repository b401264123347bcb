"""bitsandbytes' quantization of a checkpoint as a weight source, to hold a GGUF file against.

Owns: which tensors bitsandbytes would hold in fewer bits, their values as it would give them back,
and the size of it all. Leaves out: the forward, and any codec: `bitsandbytes.functional` quantizes
and dequantizes, on the CPU, one tensor at a time.

What is converted: the `nn.Linear`s other than the output matrix, as transformers'
`BitsAndBytesConfig` does with its defaults, and every expert's matrix. The last is kinder to
bitsandbytes than transformers is: experts are 3-D parameters there, no `nn.Linear`, and stay in
16 bits, which would leave most of an MoE unquantized; bitsandbytes' own
`nn.parametrize.replace_parameter_4bit` is for them. Embeddings, norms and routers that are no
`nn.Linear` keep their dtype.

- nf4: blocks of 64 values, one float32 absmax each, no double quantization (the default of
  `bnb_4bit_use_double_quant`): 4.5 bits per value. Blocks do not stop at rows (QLoRA, Dettmers et
  al. 2023).
- int8: one float32 absmax per row, of the weights rounded to float16 first, as `Int8Params` does
  (LLM.int8(), Dettmers et al. 2022). Weights only: activations are not rounded to 8 bits and no
  outlier columns are split off, so that the real LLM.int8() is no better than this.
"""

import logging
from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from moequant.architectures import ModelSpec
from moequant.calibrate.forward import empty_model
from moequant.calibrate.weights import WeightNames
from moequant.checkpoint import Checkpoint
from moequant.errors import UsageError
from moequant.evaluation_options import BASELINES

NF4_BLOCK = 64  # values
ABSMAX_BYTES = 4  # a float32, per block (nf4) or per row (int8)


class BaselineWeights:
    """The tensors of `checkpoint`, with those bitsandbytes converts as it would hold them.

    `kind` is one of `BASELINES`. `quantized` are the names of the converted tensors. `size_bytes`
    counts codes, absmax values, and what is kept in its own dtype; not the 16-entry code table.
    Serves what `WeightSource` asks for.

    Raises:
        UsageError: an unknown `kind`.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, kind: str) -> None:
        """Decide on names; reads no weight."""
        if kind not in BASELINES:
            raise UsageError(f"{kind!r} is no baseline; there are {' and '.join(BASELINES)}.")
        self.kind = kind
        self._checkpoint = checkpoint
        self._names = {name for tensor in spec.tensors for name in tensor.sources}
        self.quantized = frozenset(_converted(checkpoint, spec) & self._names)

    @property
    def tensors(self) -> Mapping[str, Any]:
        """The checkpoint's names, shapes and dtypes."""
        return self._checkpoint.tensors

    def read(self, name: str) -> Tensor:
        """The tensor as the kernels see it: nf4 in the checkpoint's dtype, int8 in float32."""
        tensor = self._checkpoint.read(name)
        return self._round_trip(tensor) if name in self.quantized else tensor

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Entries start:stop of axis 0; of experts, no more than these are quantized."""
        if name not in self.quantized:
            return self._checkpoint.read_slice(name, start, stop)
        if len(self.tensors[name].shape) > 2:
            return self._round_trip(self._checkpoint.read_slice(name, start, stop))
        return self.read(name)[start:stop]

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all tensors that an export of this model holds."""
        return sum(
            quantized_bytes(self.tensors[name].shape, self.kind)
            if name in self.quantized
            else self.tensors[name].nbytes
            for name in self._names
        )

    @property
    def bpw(self) -> float:
        """Bits per value over the same tensors."""
        values: int = sum(prod(self.tensors[name].shape) for name in self._names)
        return 8 * self.size_bytes / values

    def _round_trip(self, tensor: Tensor) -> Tensor:
        """Quantized and dequantized; a 3-D tensor matrix by matrix."""
        if tensor.ndim > 2:
            return torch.stack([self._round_trip(matrix) for matrix in tensor])
        return _nf4(tensor) if self.kind == "nf4" else _int8(tensor)


def quantized_bytes(shape: Iterable[int], kind: str) -> int:
    """Bytes of a matrix, or a stack of matrices, of `shape` (…, rows, in): codes and absmax."""
    *stack, rows, columns = shape
    values = rows * columns
    if kind == "nf4":
        each = -(-values // 2) + ABSMAX_BYTES * -(-values // NF4_BLOCK)
    else:
        each = values + ABSMAX_BYTES * rows
    return prod(stack) * each


def _converted(checkpoint: Checkpoint, spec: ModelSpec) -> set[str]:
    """The checkpoint's names of linear weights, without the output matrix, and of experts."""
    model = empty_model(spec)
    head = model.get_output_embeddings()
    linear = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    }
    names = WeightNames(model, checkpoint, spec.prefix)
    found = {name for name in checkpoint.tensors if names.parameter(name) in linear}
    return found.union(*(tensor.sources for tensor in spec.tensors if tensor.is_expert))


def _nf4(matrix: Tensor) -> Tensor:
    functional = _functional()
    codes, state = functional.quantize_4bit(
        matrix.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False
    )
    values: Tensor = functional.dequantize_4bit(codes, state)
    return values


def _int8(matrix: Tensor) -> Tensor:
    functional = _functional()
    codes, absmax, _ = functional.int8_vectorwise_quant(matrix.contiguous().to(torch.float16))
    values: Tensor = functional.int8_vectorwise_dequant(codes, absmax)
    return values


@cache
def _functional() -> ModuleType:
    """`bitsandbytes.functional`: imported late, for it takes seconds, and without its notes."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional
    finally:
        logger.setLevel(before)
    return functional  # type: ignore[no-any-return]
