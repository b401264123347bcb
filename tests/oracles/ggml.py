"""ggml's own encoders and decoders, by ctypes: the oracle for `moequant.quants`.

Owns: calling `ggml_quantize_chunk` and a type's `to_float`. Leaves out: any judgement.
"""

import ctypes
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from moequant.qtypes import QUANT_TYPES
from moequant.runtime.llama_cpp import LlamaCpp

FLOATS = ctypes.POINTER(ctypes.c_float)
ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, FLOATS, ctypes.c_int64)


class TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ToFloat),
        ("from_float_ref", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Ggml:
    """libggml-base, loaded."""

    path: Path

    @classmethod
    def of(cls, llama_cpp: LlamaCpp) -> "Ggml":
        return cls(llama_cpp.library("ggml-base"))

    @cached_property
    def library(self) -> ctypes.CDLL:
        library = ctypes.CDLL(str(self.path))
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        library.ggml_quantize_chunk.argtypes = (
            ctypes.c_int, FLOATS, ctypes.c_void_p,
            ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, FLOATS,
        )  # fmt: skip
        library.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
        library.ggml_get_type_traits.argtypes = (ctypes.c_int,)
        return library

    def traits(self, qtype: str) -> TypeTraits:
        traits: TypeTraits = self.library.ggml_get_type_traits(QUANT_TYPES[qtype].id).contents
        return traits

    def quantize(
        self, x: torch.Tensor, qtype: str, importance: torch.Tensor | None = None
    ) -> torch.Tensor:
        """float32 [rows, cols] to uint8 [rows, row_bytes]."""
        if qtype == "F32":  # ggml_quantize_chunk copies it; its assertion on the size differs
            return x.clone().view(torch.uint8)
        rows, cols = x.shape
        source = np.ascontiguousarray(x.numpy())
        out = np.full((rows, QUANT_TYPES[qtype].row_bytes(cols)), 0xFF, dtype=np.uint8)
        weights = None if importance is None else np.ascontiguousarray(importance.numpy())
        written = self.library.ggml_quantize_chunk(
            QUANT_TYPES[qtype].id,
            source.ctypes.data_as(FLOATS),
            out.ctypes.data_as(ctypes.c_void_p),
            0,
            rows,
            cols,
            None if weights is None else weights.ctypes.data_as(FLOATS),
        )
        assert written == out.nbytes, (qtype, written, out.nbytes)
        return torch.from_numpy(out)

    def dequantize(self, data: torch.Tensor, qtype: str, cols: int) -> torch.Tensor:
        """uint8 [rows, row_bytes] to float32 [rows, cols]."""
        if qtype == "F32":  # has no to_float: it is what it is
            return data.contiguous().view(torch.float32)
        source = np.ascontiguousarray(data.numpy())
        out = np.full((len(source), cols), np.nan, dtype=np.float32)
        self.traits(qtype).to_float(
            source.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(FLOATS), out.size
        )
        return torch.from_numpy(out)


def weighted_error(
    x: torch.Tensor, decoded: torch.Tensor, importance: torch.Tensor | None
) -> torch.Tensor:
    """sum_j importance_j (x_j - x̂_j)² per row, float64 [rows]."""
    squares = (x.double() - decoded.double()) ** 2
    return (squares if importance is None else squares * importance.double()).sum(dim=1)
