"""A part of a checkpoint that reads like a checkpoint of its own.

Owns: leaving tensors out, another configuration, and rows of a matrix multiplied by a vector that
is left out. Leaves out: which tensors, and why (`moequant.without_experts`).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from moequant.checkpoint.finite import check_finite
from moequant.checkpoint.header import TensorInfo
from moequant.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class CheckpointPart(Checkpoint):
    """The tensors of `whole` that are in `tensors`, some of them with their rows multiplied.

    `folded` maps a matrix (rows, …) to a vector (rows,) of `whole`: row i is multiplied by value i.
    Such a matrix is float32, so that the product of two bfloat16 or float16 values is exact; its
    `TensorInfo` has that dtype, and file and bytes of the matrix as it is stored.
    """

    whole: Checkpoint = field(kw_only=True, repr=False)
    folded: Mapping[str, str] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> torch.Tensor:
        """As `Checkpoint.read`; raises for NaN and Inf in a vector that is multiplied in, too."""
        self._info(name)
        return self._multiplied(name, self.whole.read(name), 0)

    def read_slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """As `Checkpoint.read_slice`."""
        self._info(name)
        return self._multiplied(name, self.whole.read_slice(name, start, stop), start)

    def _multiplied(self, name: str, rows: torch.Tensor, start: int) -> torch.Tensor:
        vector_name = self.folded.get(name)
        if vector_name is None:
            return rows
        vector = self.whole.read(vector_name)
        check_finite(vector_name, vector, self.whole.tensors[vector_name].file)
        factors = vector[start : start + len(rows)].float()
        return rows.float() * factors.reshape(-1, *[1] * (rows.ndim - 1))


def part_of(
    whole: Checkpoint,
    part: str,
    *,
    config: dict[str, Any],
    without: frozenset[str],
    folded: Mapping[str, str],
    notes: tuple[str, ...] = (),
) -> CheckpointPart:
    """`whole` under another `config` and without the tensors `without`.

    `part` says which part it is, in words, for metadata; the digest depends on it. `folded`: see
    `CheckpointPart`. `notes` are added to the checkpoint's.
    """
    kept = {name: info for name, info in whole.tensors.items() if name not in without}
    for name in folded:
        kept[name] = _as_float32(kept[name])
    return CheckpointPart(
        path=whole.path,
        name=whole.name,
        config=config,
        tensors=MappingProxyType(kept),
        revision=whole.revision,
        notes=whole.notes + notes,
        part=part,
        whole=whole,
        folded=MappingProxyType(dict(folded)),
        _digest=hashlib.sha256(f"{whole.digest()} {part}".encode()).hexdigest(),
    )


def _as_float32(info: TensorInfo) -> TensorInfo:
    return replace(info, dtype=torch.float32)
