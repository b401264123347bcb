"""`describe`: from an opened checkpoint to a `ModelSpec`, with every check on names and shapes.

Owns: expanding a family's rows to tensors, and accounting for every name both ways: nothing in the
checkpoint silently dropped, nothing in the GGUF unexplained. Leaves out: values; no weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moequant.architectures.config import readable, text_config
from moequant.architectures.family import Family, Layout, Row, Scope
from moequant.architectures.ops import Constant, Op, Shape
from moequant.architectures.spec import ModelSpec, TensorSpec
from moequant.architectures.table import family_of
from moequant.errors import CheckpointError, listing

if TYPE_CHECKING:
    from moequant.checkpoint import Checkpoint

# What stands before the text model's names, and before `lm_head`; the first that fits is taken.
PREFIXES = (
    ("model.language_model.", ""),
    ("language_model.model.", "language_model."),
    ("model.", ""),
)
BUFFERS = re.compile(r"rotary_emb\.(\w+_)?inv_freq$|\.attention\.(masked_)?bias$")
FLOATS = ("torch.float32", "torch.float16", "torch.bfloat16")


def describe(checkpoint: Checkpoint) -> ModelSpec:
    """The model in `checkpoint`, after checking every name, shape and dtype against its config.

    Raises:
        ArchitectureError: an unknown `model_type`, or a variant llama.cpp does not run.
        CheckpointError: tensors missing, of the wrong shape or dtype, or nobody's; all are listed.
    """
    family = family_of(checkpoint.config)
    config = text_config(checkpoint.config, family)
    prefix, head = _prefix(checkpoint.tensors)
    with readable():
        layout = family.layout(config, _own_names(checkpoint.tensors, prefix, head))
    accounts = _Accounts()
    tensors = tuple(_tensors(family, layout, prefix, head, accounts))
    left_out = _check(checkpoint, family, layout, accounts, tensors)
    return _spec(family, layout, config, tensors, left_out, prefix)


@dataclass
class _Accounts:
    """Who answers for which checkpoint name."""

    expected: dict[str, Shape] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)  # knowingly left out
    wrong: dict[str, str] = field(default_factory=dict)  # name -> why it should not be there


def _prefix(names: Iterable[str]) -> tuple[str, str]:
    """The pair of `PREFIXES` under which the checkpoint has its layers."""
    found = set(names)
    for prefix, head in PREFIXES:
        if any(name.startswith((f"{prefix}layers.", f"{prefix}embed_tokens.")) for name in found):
            return prefix, head
    known = ", ".join(f"{prefix}layers.*" for prefix, _ in PREFIXES)
    raise CheckpointError(f"No tensor of a text model: none of {known} is in the checkpoint.")


def _own_names(names: Iterable[str], prefix: str, head: str) -> frozenset[str]:
    """The text model's names without `prefix`, and `lm_head`'s without `head`."""
    own = set()
    for name in names:
        if name.startswith(prefix):
            own.add(name.removeprefix(prefix))
        elif name.startswith(f"{head}lm_head."):
            own.add(name.removeprefix(head))
    return frozenset(own)


def _tensors(
    family: Family, layout: Layout, prefix: str, head: str, accounts: _Accounts
) -> Iterator[TensorSpec]:
    """Every tensor of the file in file order; fills in `accounts` on the way."""
    for row in family.first:
        yield from _expand(family, row, layout.outside, None, prefix, accounts)
    for bid, scope in enumerate(layout.layers):
        for row in family.layer:
            yield from _expand(family, row, scope, bid, f"{prefix}layers.{bid}.", accounts)
    for row in family.last:
        before = head if row.at_head else prefix
        yield from _expand(family, row, layout.outside, None, before, accounts)


def _expand(
    family: Family, row: Row, scope: Scope, bid: int | None, before: str, accounts: _Accounts
) -> Iterator[TensorSpec]:
    """The tensor of `row` in `scope`, or none where the row does not hold there."""
    op: Op = row.op if row.source else Constant(scope.constants[row.gguf])
    sources = op.sources(before + row.source, scope.sizes)
    if row.when and row.when not in scope.features:
        if row.when in scope.unused:
            accounts.unused.update(sources)
        else:
            reason = family.explain.get(row.when, f"not in a model without {row.when}")
            accounts.wrong.update(dict.fromkeys(sources, reason))
        return
    shape = tuple(scope.sizes[size] for size in row.shape)
    accounts.expected.update(dict.fromkeys(sources, op.source_shape(shape)))
    stacked = len(shape) == 3
    yield TensorSpec(
        name=row.gguf if bid is None else f"blk.{bid}.{row.gguf}",
        shape=shape,
        sources=sources,
        bid=bid,
        role=row.gguf.removesuffix(".weight"),
        n_matrices=shape[0] if stacked else 1,
        is_expert=stacked,
        op=op,
    )


def _check(
    checkpoint: Checkpoint,
    family: Family,
    layout: Layout,
    accounts: _Accounts,
    tensors: tuple[TensorSpec, ...],
) -> tuple[str, ...]:
    """The names left out; raises CheckpointError with every offender."""
    offenders = [
        *_unmet(checkpoint, accounts.expected),
        *_experts_of(family, layout, tensors),
    ]
    left_out = []
    for name in checkpoint.tensors:
        if name in accounts.expected:
            continue
        if name in accounts.unused or _is_left_out(name, family):
            left_out.append(name)
        else:
            offenders.append(f"{name}: unexpected{_because(accounts.wrong.get(name, ''))}")
    if offenders:
        raise CheckpointError(
            f"{checkpoint.path}: {len(offenders)} tensors are not what config.json describes:"
            + listing(offenders)
        )
    return tuple(left_out)


def _because(reason: str) -> str:
    return f" ({reason})" if reason else ""


def _unmet(checkpoint: Checkpoint, expected: Mapping[str, Shape]) -> Iterator[str]:
    """One line for every expected tensor that is missing, or of another shape or dtype."""
    for name, shape in expected.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            yield f"{name}: missing, of shape {list(shape)}"
        elif tuple(info.shape) != shape or min(shape) < 1:
            yield f"{name}: shape {list(info.shape)}, expected {list(shape)}"
        elif str(info.dtype) not in FLOATS:
            yield f"{name}: dtype {info.dtype}, expected one of {', '.join(FLOATS)}"


def _experts_of(family: Family, layout: Layout, tensors: tuple[TensorSpec, ...]) -> Iterator[str]:
    """What is wrong with the number of experts."""
    has_experts = any(tensor.is_expert for tensor in tensors)
    count, used = layout.expert_count, layout.expert_used_count
    if has_experts and not 1 <= used <= count:
        yield f"{used} experts used per token, of {count}"
    if count and not has_experts:
        yield f"config.json describes {count} experts, but no layer has a router"
    if not count and any("experts" in row.shape and not row.when for row in family.layer):
        yield "config.json describes no experts"


def _is_left_out(name: str, family: Family) -> bool:
    return name.removeprefix("model.").startswith(family.left_out) or bool(BUFFERS.search(name))


def _spec(
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
