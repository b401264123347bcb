"""The dtypes a safetensors header may name, and what torch calls them.

Owns: one table, name -> (torch dtype, bits per element). Leaves out: conversions between them.

Source: the `Dtype` enum of safetensors 0.8 (`safetensors/src/tensor.rs`). F4 holds two values to a
byte, and torch's dtype for it is that byte, so the last axis of such a tensor is half as long in
torch as in the header. The two F6 dtypes have no torch counterpart; a torch older than 2.8 lacks
some of the 8-bit and 4-bit ones too.
"""

import torch

_TORCH_NAMES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 8),
    "F4": ("float4_e2m1fn_x2", 4),
    "F6_E2M3": ("", 6),
    "F6_E3M2": ("", 6),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}

BITS: dict[str, int] = {name: bits for name, (_, bits) in _TORCH_NAMES.items()}
"""Bits per element of every dtype that safetensors knows."""

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name)
    for name, (torch_name, _) in _TORCH_NAMES.items()
    if torch_name and hasattr(torch, torch_name)
}
"""The torch dtype of each of those that the installed torch can hold."""
