"""`describe`: from an opened checkpoint to a `ModelSpec`, with every check on names and shapes.

Owns: accounting for every name both ways: nothing in the checkpoint silently dropped, nothing in
the GGUF unexplained. Leaves out: expanding the rows (`expand`), and values; no weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from moequant.architectures.config import readable, text_config
from moequant.architectures.expand import Accounts, expand, model_spec
from moequant.architectures.family import Family, Layout
from moequant.architectures.ops import Shape
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
    accounts = Accounts()
    tensors = tuple(expand(family, layout, prefix, head, accounts))
    left_out = _check(checkpoint, family, layout, accounts, tensors)
    return model_spec(family, layout, config, tensors, left_out, prefix)


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


def _check(
    checkpoint: Checkpoint,
    family: Family,
    layout: Layout,
    accounts: Accounts,
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
