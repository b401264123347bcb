"""What the planner needs to know of a model: names, shapes and a few hyperparameters.

Owns: the two protocols that `moequant.architectures`' ModelSpec and TensorSpec satisfy, and what
can be read off a GGUF tensor name. Leaves out: values, files, torch. A test may plan for a model
of two lines of dataclass.
"""

import re
from collections.abc import Sequence
from typing import Protocol

_BLOCK = re.compile(r"blk\.(\d+)\.")


class Tensor(Protocol):
    """One GGUF tensor before it has a type."""

    @property
    def name(self) -> str:
        """GGUF name, e.g. `blk.3.ffn_down_exps.weight`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Torch order: (rows, in), (experts, rows, in) or (n,)."""


class Model(Protocol):
    """The hyperparameters that llama-quantize's choice of types looks at."""

    @property
    def architecture(self) -> str:
        """GGUF `general.architecture`, e.g. `gemma4`."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Every tensor of the file, in file order."""

    @property
    def block_count(self) -> int:
        """GGUF `block_count`."""

    @property
    def expert_count(self) -> int:
        """GGUF `expert_count`; 0 for a dense model."""

    @property
    def head_count(self) -> int:
        """Attention heads (of the first layer, should layers differ)."""

    @property
    def head_count_kv(self) -> Sequence[int]:
        """Key/value heads, one number per layer."""


def block_of(name: str) -> int | None:
    """The layer of `blk.N.*`, or None for a tensor outside the layers."""
    match = _BLOCK.match(name)
    return int(match[1]) if match else None


def role_of(name: str) -> str:
    """The name without `blk.N.` and `.weight`: what a tensor is, whichever layer it is in."""
    return _BLOCK.sub("", name, count=1).removesuffix(".weight")
