"""Types for single experts, by a first simple rule: bits from some experts go to others.

Owns: the ladder of types, which tensors the rule applies to, and the rule. Leaves out: measuring
the errors that it ranks by (`moequant.expert_errors`). Scores and sizes in, types out.

In each stack of E experts the E // 4 with the highest score go one step up the ladder, and the
E // 4 with the lowest one step down. A step up does not cost what a step down frees, so bytes are
counted from stack to stack, in file order: as few experts go down as pay for those that go up, and
fewer go up where all that go down do not pay for them. The weights are then never larger than the
preset's, and smaller by less than what one expert's step is worth. Of experts with the same score,
the one with the lower number ranks higher.

One step is the next type of llama-quantize's K-quants; for rows that are not whole blocks of 256,
the next of the types that it puts in their place. A type beside the ladder (IQ4_XS, Q4_1)
steps from where it stands onto it. Where a step up or down does not exist, all experts stay.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from moequant.errors import PlanError, listing
from moequant.expert_banks import can_have_banks
from moequant.plan import sizes
from moequant.plan.plan import Plan, TensorPlan

PART = 4  # one quarter up, one quarter down
# type → one step down, one step up
_STEPS_OF_256 = {
    "Q3_K": ("Q2_K", "Q4_K"),
    "Q4_K": ("Q3_K", "Q5_K"),
    "IQ4_XS": ("Q3_K", "Q5_K"),
    "Q5_K": ("Q4_K", "Q6_K"),
    "Q6_K": ("Q5_K", "Q8_0"),
}
_STEPS_OF_32 = {
    "Q5_0": ("Q4_0", "Q5_1"),
    "Q4_1": ("Q4_0", "Q5_1"),
    "Q5_1": ("Q5_0", "Q8_0"),
}
STEPS = {**_STEPS_OF_256, **_STEPS_OF_32}


def rankable(plan: Plan) -> tuple[TensorPlan, ...]:
    """The stacks in which the rule gives experts types of their own: whose scores it asks for.

    PlanError where there is none, which says why.
    """
    moves = _moves(plan)
    if not moves:
        stacks = [tensor for tensor in plan.tensors if can_have_banks(tensor.name)]
        raise PlanError(
            f"per-expert precision: under {plan.preset} experts of one tensor cannot differ:"
            f"{listing(_reasons(stacks))}\n"
            f"These types have a step up and a step down: {', '.join(STEPS)}."
        )
    return tuple(tensor for tensor in plan.tensors if tensor.name in moves)


def per_expert_plan(plan: Plan, scores: Mapping[str, Sequence[float]]) -> Plan:
    """`plan` with types for single experts by the rule above.

    `scores`: for each tensor of `rankable(plan)`, one finite number per expert: how much its error
    weighs. PlanError as `rankable`; ValueError if scores are missing, too many or not finite.
    """
    moves = _moves(plan)
    changed = {
        tensor.name: tensor.with_experts(_types(tensor, moves[tensor.name], scores[tensor.name]))
        for tensor in rankable(plan)
    }
    tensors = tuple(changed.get(tensor.name, tensor) for tensor in plan.tensors)
    return dataclasses.replace(plan, tensors=tensors)


def _moves(plan: Plan) -> dict[str, tuple[int, int]]:
    """Stack → how many experts go up and how many down, where any do. Sizes alone decide."""
    moves, spare = {}, 0
    for tensor in plan.tensors:
        if not _has_steps(tensor):
            continue
        freed, cost = _worth(tensor)
        most = tensor.shape[0] // PART
        up = min(most, (spare + most * freed) // cost)
        down = max(0, -(-(up * cost - spare) // freed))
        spare += down * freed - up * cost
        if up:
            moves[tensor.name] = (up, down)
    return moves


def _has_steps(tensor: TensorPlan) -> bool:
    is_stack = can_have_banks(tensor.name) and not tensor.experts
    return is_stack and tensor.shape[0] >= PART and tensor.qtype in STEPS


def _worth(tensor: TensorPlan) -> tuple[int, int]:
    """Bytes that one expert frees by a step down, and costs by a step up."""
    one = (1, *tensor.shape[1:])
    lower, own, higher = (
        sizes.tensor_bytes(qtype, one)
        for qtype in (STEPS[tensor.qtype][0], tensor.qtype, STEPS[tensor.qtype][1])
    )
    return own - lower, higher - own


def _reasons(stacks: Sequence[TensorPlan]) -> Iterator[str]:
    """Why each kind of stack stays as it is; one line for each reason."""
    if not stacks:
        yield "the model has no experts"
    for qtype, count in dict.fromkeys((tensor.qtype, tensor.shape[0]) for tensor in stacks):
        if count < PART:
            yield f"{count} experts are fewer than {PART}"
        elif qtype not in STEPS:
            yield f"{qtype} has no step in both directions"
        else:
            yield f"{qtype}: of {count} experts, those that step down do not pay for one step up"


def _types(tensor: TensorPlan, moves: tuple[int, int], scores: Sequence[float]) -> tuple[str, ...]:
    """Each expert's type: the highest scores one step up, the lowest one step down."""
    if len(scores) != tensor.shape[0] or not all(map(math.isfinite, scores)):
        raise ValueError(f"{tensor.name}: expected {tensor.shape[0]} finite scores: {scores}")
    order = sorted(range(len(scores)), key=lambda expert: -scores[expert])
    (up, down), (lower, higher) = moves, STEPS[tensor.qtype]
    experts = [tensor.qtype] * len(order)
    for expert in order[:up]:
        experts[expert] = higher
    for expert in order[len(order) - down :]:
        experts[expert] = lower
    return tuple(experts)
