"""From a family's rows to the tensors of one model, whatever the model is read from.

Owns: expanding rows, and putting the `ModelSpec` together. Leaves out: holding the result against
what a checkpoint (`describe`) or a GGUF file (`from_gguf`) really has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moequant.architectures.family import Family, Layout, Row, Scope
from moequant.architectures.ops import Constant, Op, Shape
from moequant.architectures.spec import ModelSpec, TensorSpec


@dataclass
class Accounts:
    """Who answers for which checkpoint name, and for which GGUF name no row asks."""

    expected: dict[str, Shape] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)  # knowingly left out
    wrong: dict[str, str] = field(default_factory=dict)  # name -> why it should not be there
    unused_gguf: set[str] = field(default_factory=set)  # the same two by GGUF names
    wrong_gguf: dict[str, str] = field(default_factory=dict)


def expand(
    family: Family, layout: Layout, prefix: str, head: str, accounts: Accounts
) -> Iterator[TensorSpec]:
    """Every tensor of the file in file order; fills in `accounts` on the way."""
    for row in family.first:
        yield from _of_row(family, row, layout.outside, None, prefix, accounts)
    for bid, scope in enumerate(layout.layers):
        for row in family.layer:
            yield from _of_row(family, row, scope, bid, f"{prefix}layers.{bid}.", accounts)
    for row in family.last:
        before = head if row.at_head else prefix
        yield from _of_row(family, row, layout.outside, None, before, accounts)


def _of_row(
    family: Family, row: Row, scope: Scope, bid: int | None, before: str, accounts: Accounts
) -> Iterator[TensorSpec]:
    """The tensor of `row` in `scope`, or none where the row does not hold there."""
    op: Op = row.op if row.source else Constant(scope.constants[row.gguf])
    sources = op.sources(before + row.source, scope.sizes)
    name, *halves = (
        name if bid is None else f"blk.{bid}.{name}" for name in (row.gguf, *row.halves)
    )
    if row.when and row.when not in scope.features:
        if row.when in scope.unused:
            accounts.unused.update(sources)
            accounts.unused_gguf.update((name, *halves))
        else:
            reason = family.explain.get(row.when, f"not in a model without {row.when}")
            accounts.wrong.update(dict.fromkeys(sources, reason))
            accounts.wrong_gguf.update(dict.fromkeys((name, *halves), reason))
        return
    shape = tuple(scope.sizes[size] for size in row.shape)
    accounts.expected.update(dict.fromkeys(sources, op.source_shape(shape)))
    stacked = len(shape) == 3
    yield TensorSpec(
        name=name,
        shape=shape,
        sources=sources,
        bid=bid,
        role=row.gguf.removesuffix(".weight"),
        n_matrices=shape[0] if stacked else 1,
        is_expert=stacked,
        op=op,
        halves=tuple(halves),
    )


def model_spec(
    family: Family,
    layout: Layout,
    config: dict[str, Any],
    tensors: tuple[TensorSpec, ...],
    left_out: tuple[str, ...],
    prefix: str,
) -> ModelSpec:
    moe_layers = sorted({t.bid for t in tensors if t.is_expert and t.bid is not None})
    return ModelSpec(
        architecture=family.architecture,
        config=config,
        tensors=tensors,
        left_out=left_out,
        block_count=len(layout.layers),
        expert_count=layout.expert_count,
        expert_used_count=layout.expert_used_count,
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        head_count=config["num_attention_heads"],
        head_count_kv=layout.head_count_kv,
        context_length=config["max_position_embeddings"],
        tied_embeddings=all(tensor.name != "output.weight" for tensor in tensors),
        prefix=prefix,
        moe_layers=tuple(moe_layers),
    )
