"""Model families: HF names to GGUF names, keys, tokenizer, and what is an expert.

Owns: one frozen row per family (`gemma4`, `qwen3`), the table of them, and `describe` and
`describe_gguf`, which check a checkpoint or a GGUF file against its row on names and shapes. Leaves
out: reading weights (`checkpoint`), types
(`plan`) and writing (`gguf_export`). Importing this imports no torch, so that the planner may.
"""

from moequant.architectures.converter_types import converter_type
from moequant.architectures.describe import describe
from moequant.architectures.from_gguf import describe_gguf
from moequant.architectures.spec import ModelSpec, TensorSpec
from moequant.architectures.table import FAMILIES, family_named, family_of

__all__ = [
    "FAMILIES",
    "ModelSpec",
    "TensorSpec",
    "converter_type",
    "describe",
    "describe_gguf",
    "family_named",
    "family_of",
]
