"""The dense part of an additive MoE, as a checkpoint of a dense model.

Owns: which tensors and which values of the configuration go. Leaves out: what a family's experts
are (`Family.without_experts`), and reading (`checkpoint.part`).

Why that is the same model: where the experts add nothing, a layer of Gemma 4 computes
post_norm(norm_1(y)) from its MLP's output y. With RMSNorm(y) = w ⊙ y / sqrt(mean(y²) + eps) and w1
the weights of norm_1, norm_1(y) is w1 ⊙ y up to a factor per token, s = sqrt(mean(y²) + eps), and
that factor falls out in post_norm. So a dense layer whose MLP gives w1 ⊙ y, which is down_proj
with its rows multiplied by w1, computes the same. What differs is eps: post_norm adds it to
mean((w1 ⊙ y)²) here and to that over s² there, so that a vector is longer by the relative amount
eps · (s² - 1) / (2 · mean((w1 ⊙ y)²)) (figures for the example model: docs/benchmarks.md).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from moequant.architectures import ModelSpec, describe, family_named
from moequant.architectures.family import Family, WithoutExperts
from moequant.checkpoint import Checkpoint
from moequant.checkpoint.part import part_of
from moequant.errors import ArchitectureError, UsageError

PART = "without experts"


def without_experts(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as that of a dense model: no experts, no routers, none of the norms theirs.

    Layers that have no experts stay as they are. No weight is read, and no file written.

    Raises:
        UsageError: the model has no experts.
        ArchitectureError: its experts are the layers' only MLP; and what `describe` raises.
        CheckpointError: what `describe` raises.
    """
    model = describe(checkpoint)
    family = family_named(model.architecture)
    if not model.moe_layers:
        raise UsageError(
            f"{checkpoint.name} has no experts ({model.architecture}), so there is nothing for "
            "--without-experts to leave out; export it without that option."
        )
    how = family.without_experts
    if how is None:
        raise ArchitectureError(
            f"{checkpoint.name}: in {model.architecture} the experts are a layer's only MLP; "
            "without them no model is left. --without-experts is for additive models, which have "
            "experts beside a dense MLP."
        )
    gone = frozenset(_names_of_experts(family, model, how))
    folded = dict(_folds(model, how))
    nbytes = sum(checkpoint.tensors[name].nbytes for name in gone)
    return part_of(
        checkpoint,
        PART,
        config=_with_values(checkpoint.config, how.config),
        without=gone,
        folded=folded,
        notes=(
            f"{PART}: {len(gone)} tensors of {len(model.moe_layers)} layers are left out "
            f"({nbytes / 1e6:.1f} MB of the checkpoint)",
        ),
    )


def _names_of_experts(family: Family, model: ModelSpec, how: WithoutExperts) -> Iterator[str]:
    """The checkpoint's names of all rows that hold where a layer has experts."""
    sizes = {"experts": model.expert_count}
    for bid in model.moe_layers:
        for row in family.layer:
            if row.when == how.feature:
                yield from row.op.sources(f"{model.prefix}layers.{bid}.{row.source}", sizes)


def _folds(model: ModelSpec, how: WithoutExperts) -> Iterator[tuple[str, str]]:
    """Pairs of full names (matrix, norm)."""
    for bid in model.moe_layers:
        before = f"{model.prefix}layers.{bid}."
        for matrix, norm in how.folds:
            yield before + matrix, before + norm


def _with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `values`, in its `text_config` where it has one (then not beside it)."""
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": {**config["text_config"], **values}}
    return {**config, **values}
