"""What the rest of moequant knows of a model: `ModelSpec`, and one `TensorSpec` per GGUF tensor.

Owns: these two frozen records. Leaves out: how they are made (`describe`), and types (the plan).
Shapes are in torch order: (rows, in), (experts, rows, in) or (n,).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moequant.architectures.ops import Op, Shape

if TYPE_CHECKING:
    import torch

    from moequant.checkpoint import Checkpoint


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the GGUF file, and how to get its values from the checkpoint.

    `sources` are checkpoint names, empty for a constant. `bid` is the layer, None outside layers.
    `role` is `name` without `blk.N.` and `.weight` (`attn_q`, `ffn_down_exps.scale`). `n_matrices`
    is the number of experts of a 3-D tensor, else 1; `is_expert` is true for such stacks only, so
    not for a per-expert scale, which is a vector. `halves` are the names of two tensors, each of
    `half_shape`, that a GGUF file may have in place of this one.
    """

    name: str
    shape: Shape
    sources: tuple[str, ...]
    bid: int | None
    role: str
    n_matrices: int
    is_expert: bool
    op: Op = field(repr=False)
    halves: tuple[str, ...] = ()

    @property
    def half_shape(self) -> Shape:
        """(experts, rows / 2, in): the first or last half of the rows of each matrix."""
        return (self.shape[0], self.shape[1] // 2, *self.shape[2:])

    def load(self, checkpoint: Checkpoint, matrix: int | None = None) -> torch.Tensor:
        """The values, in the checkpoint's dtype, of shape `shape`.

        `matrix=e` gives matrix e of a 3-D tensor, shape (rows, in), and reads nothing else.

        Raises:
            ValueError: `matrix` for a tensor that is not 3-D, or out of range.
            CheckpointError: the checkpoint changed since it was described.
        """
        if matrix is not None and (len(self.shape) != 3 or not 0 <= matrix < self.n_matrices):
            raise ValueError(f"{self.name} of shape {list(self.shape)} has no matrix {matrix}")
        return self.op.load(checkpoint, self.sources, matrix)


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint's model, checked on names and shapes.

    `architecture` is GGUF's name (`gemma4`). `config` is the text configuration with
    transformers' defaults filled in. `tensors` are in file order. `left_out` names the
    checkpoint's tensors that are knowingly not exported. `head_count_kv` has one number per layer.
    `expert_count` and `expert_used_count` are 0 for a dense model. `tied_embeddings` is true where
    the file has no `output.weight`. `prefix` stands before "layers." in the checkpoint's names.
    """

    architecture: str
    config: dict[str, Any]
    tensors: tuple[TensorSpec, ...]
    left_out: tuple[str, ...]
    block_count: int
    expert_count: int
    expert_used_count: int
    hidden_size: int
    vocab_size: int
    head_count: int
    head_count_kv: tuple[int, ...]
    context_length: int
    tied_embeddings: bool
    prefix: str
    moe_layers: tuple[int, ...]
