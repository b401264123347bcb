"""Counts a model's parameters: total, active per token, dense and expert.

Owns: the counting rule, for checkpoints and GGUF files alike. Leaves out: reading either.
"""

from collections.abc import Iterable
from dataclasses import dataclass

CONSTANTS = frozenset({"rope_freqs.weight"})  # computed from the config, not trained


@dataclass(frozen=True)
class Parameters:
    """`dense` serve every token; of `expert`, only the routed ones do: `active` counts those."""

    dense: int
    expert: int
    active: int

    @property
    def total(self) -> int:
        return self.dense + self.expert


def is_expert(name: str) -> bool:
    """True for a GGUF tensor that holds routed experts (a shared expert, `_shexp`, is dense)."""
    return "_exps." in name


def count_parameters(
    sizes: Iterable[tuple[str, int]], expert_count: int, expert_used_count: int
) -> Parameters:
    """Counts from (GGUF tensor name, number of values) pairs; every expert is of one size."""
    dense = expert = 0
    for name, size in sizes:
        if is_expert(name):
            expert += size
        elif name not in CONSTANTS:
            dense += size
    share = expert * expert_used_count // expert_count if expert_count else 0
    return Parameters(dense, expert, dense + share)
