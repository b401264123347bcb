"""Byte layouts of the GGUF tensor types that moequant writes: one table, checked against gguf's.

Owns: names, ids, block sizes, type sizes. Leaves out: how values become bytes (`moequant.quants`).
Imports no torch: the planner needs the table and nothing more.

Source: `block_*` structs in ggml-common.h; ids and sizes are `gguf.constants`' own, so that a
layout here that disagrees with theirs fails at import of the table's test, not in a file.
"""

from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType


@dataclass(frozen=True)
class QuantType:
    """One tensor type: `block_size` values are stored in `type_size` bytes."""

    name: str
    id: int
    block_size: int
    type_size: int

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.type_size / self.block_size

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` values; ValueError if a row cannot be cut into blocks."""
        if cols % self.block_size:
            raise ValueError(f"{self.name} needs rows of a multiple of {self.block_size}: {cols}")
        return cols // self.block_size * self.type_size


def _quant_type(name: str) -> QuantType:
    ggml_type = GGMLQuantizationType[name]
    return QuantType(name, int(ggml_type), *GGML_QUANT_SIZES[ggml_type])


QUANT_TYPES: dict[str, QuantType] = {
    name: _quant_type(name)
    for name in (
        "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
        "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
    )
}  # fmt: skip
