"""What is done to checkpoint tensors to get a GGUF tensor: one small frozen op each.

Owns: `Copy`, `Stack`, `Constant`, and the protocol that a further op (permute, add one, split,
transpose) has to meet. Leaves out: names and shapes, which the rows state, and quantizing.

An op reads no more than what is asked for: matrix `e` of a stack costs one matrix of memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # the planner imports this package and must not import torch
    import torch

    from moequant.checkpoint import Checkpoint

Shape = tuple[int, ...]


class Op(Protocol):
    """How one GGUF tensor is made of checkpoint tensors."""

    def sources(self, name: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """The checkpoint tensors behind `name`, which may hold a `{e}` for the expert."""

    def source_shape(self, shape: Shape) -> Shape:
        """The shape of each source, if the GGUF tensor's is `shape` (both in torch order)."""

    def load(
        self, checkpoint: Checkpoint, sources: tuple[str, ...], matrix: int | None
    ) -> torch.Tensor:
        """The values in native dtype; `matrix` picks one of a 3-D tensor."""


@dataclass(frozen=True)
class Copy:
    """The checkpoint's tensor as it is."""

    def sources(self, name: str, sizes: Mapping[str, int]) -> tuple[str, ...]:  # noqa: ARG002
        return (name,)

    def source_shape(self, shape: Shape) -> Shape:
        return shape

    def load(
        self, checkpoint: Checkpoint, sources: tuple[str, ...], matrix: int | None
    ) -> torch.Tensor:
        if matrix is None:
            return checkpoint.read(sources[0])
        return checkpoint.read_slice(sources[0], matrix, matrix + 1)[0]


@dataclass(frozen=True)
class Stack:
    """One (rows, in) tensor per expert, stacked to (experts, rows, in) in the experts' order."""

    def sources(self, name: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
        return tuple(name.format(e=expert) for expert in range(sizes["experts"]))

    def source_shape(self, shape: Shape) -> Shape:
        return shape[1:]

    def load(
        self, checkpoint: Checkpoint, sources: tuple[str, ...], matrix: int | None
    ) -> torch.Tensor:
        import torch

        if matrix is None:
            return torch.stack([checkpoint.read(source) for source in sources])
        return checkpoint.read(sources[matrix])


@dataclass(frozen=True)
class Constant:
    """Values that follow from the configuration; float32, one axis, no source."""

    values: tuple[float, ...]

    def sources(self, name: str, sizes: Mapping[str, int]) -> tuple[str, ...]:  # noqa: ARG002
        return ()

    def source_shape(self, shape: Shape) -> Shape:
        return shape

    def load(
        self,
        checkpoint: Checkpoint,  # noqa: ARG002
        sources: tuple[str, ...],  # noqa: ARG002
        matrix: int | None,  # noqa: ARG002
    ) -> torch.Tensor:
        import torch

        return torch.tensor(self.values, dtype=torch.float32)


COPY = Copy()
STACK = Stack()
