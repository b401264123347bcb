"""Types for single experts: the rule worked out by hand, its bounds on any model, the document."""

import dataclasses
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moequant.errors import PlanError
from moequant.plan import Plan, TensorPlan, fallback_rows, per_expert_plan, preset_plan, rankable
from moequant.plan.per_expert import STEPS
from moequant.qtypes import QUANT_TYPES
from tests.plan.models import KINDS, FakeModel, FakeTensor

UP, DOWN = "blk.0.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight"
PRESETS = ("Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS", "Q5_0")


def stack(qtype: str, experts: int = 8, cols: int = 256, name: str = UP) -> TensorPlan:
    """A stack of matrices of two rows."""
    return TensorPlan(name, (experts, 2, cols), qtype, qtype)


def plan_of(*tensors: TensorPlan) -> Plan:
    return Plan("Q4_K_M", "qwen3moe", tensors)


def types(plan: Plan, scores: dict[str, list[float]]) -> list[tuple[str, ...]]:
    return [tensor.experts for tensor in per_expert_plan(plan, scores).tensors]


def matrix_bytes(plan: Plan) -> int:
    """Bytes of all matrices, without the maps of banks."""
    return sum(sum(tensor.bytes_by_type.values()) for tensor in plan.tensors)


def test_the_best_quarter_steps_up_and_the_worst_steps_down() -> None:
    """Q4_K to Q5_K costs 32 bytes a block, Q4_K to Q3_K frees 34: two for two."""
    scores = [3.0, 9.0, 1.0, 7.0, 5.0, 0.0, 4.0, 6.0]
    made = types(plan_of(stack("Q4_K")), {UP: scores})
    assert made == [("Q4_K", "Q5_K", "Q3_K", "Q5_K", "Q4_K", "Q3_K", "Q4_K", "Q4_K")]


def test_no_more_step_down_than_pay() -> None:
    """Q5_0 to Q5_1 costs 2 bytes a block, to Q4_0 frees 4: one expert pays for two."""
    made = types(plan_of(stack("Q5_0", cols=96)), {UP: [float(8 - e) for e in range(8)]})
    assert made == [("Q5_1", "Q5_1", "Q5_0", "Q5_0", "Q5_0", "Q5_0", "Q5_0", "Q4_0")]


def test_no_more_step_up_than_is_paid_for() -> None:
    """Q3_K to Q4_K costs 34 bytes a block, to Q2_K frees 26: two pay for one, which leaves 18."""
    made = types(plan_of(stack("Q3_K")), {UP: [float(8 - e) for e in range(8)]})
    assert made == [("Q4_K", "Q3_K", "Q3_K", "Q3_K", "Q3_K", "Q3_K", "Q2_K", "Q2_K")]


def test_what_is_left_over_goes_to_the_next_stack() -> None:
    """18 of a block and 52 more pay for two steps of 34."""
    plan = plan_of(stack("Q3_K"), stack("Q3_K", name=DOWN))
    falling = [float(8 - e) for e in range(8)]
    first, second = types(plan, {UP: falling, DOWN: falling})
    assert [made.count("Q4_K") for made in (first, second)] == [1, 2]
    assert [made.count("Q2_K") for made in (first, second)] == [2, 2]


@pytest.mark.parametrize(("experts", "moved"), [(4, 1), (5, 1), (7, 1), (9, 2), (15, 3)])
def test_a_quarter_is_rounded_down(experts: int, moved: int) -> None:
    (made,) = types(plan_of(stack("Q4_K", experts)), {UP: [1.0] * experts})
    counts = [made.count(qtype) for qtype in ("Q5_K", "Q3_K", "Q4_K")]
    assert counts == [moved, moved, experts - 2 * moved]


def test_of_equals_the_lower_number_ranks_higher() -> None:
    (made,) = types(plan_of(stack("Q4_K")), {UP: [2.0] * 8})
    assert made == ("Q5_K", "Q5_K", "Q4_K", "Q4_K", "Q4_K", "Q4_K", "Q3_K", "Q3_K")


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([TensorPlan("blk.0.ffn_up.weight", (2, 256), "Q4_K", "Q4_K")], "the model has no experts"),
        ([stack("Q4_K", experts=3)], "3 experts are fewer than 4"),
        ([stack("Q2_K")], "Q2_K has no step in both directions"),
        ([stack("Q8_0"), stack("Q4_0", name=DOWN)], "Q8_0 has no step.*\n.*Q4_0 has no step"),
        ([stack("Q6_K", experts=4)], "Q6_K: of 4 experts, those that step down do not pay"),
    ],
)
def test_what_cannot_differ_is_refused_with_the_reason(
    tensors: list[TensorPlan], reason: str
) -> None:
    with pytest.raises(PlanError, match=reason):
        rankable(plan_of(*tensors))
    with pytest.raises(PlanError, match=reason):
        per_expert_plan(plan_of(*tensors), {})


def test_a_stack_without_steps_stays() -> None:
    plan = plan_of(stack("Q4_K"), stack("Q8_0", name=DOWN))
    assert [tensor.name for tensor in rankable(plan)] == [UP]
    made = per_expert_plan(plan, {UP: [1.0] * 8})
    assert made.tensors[1] == plan.tensors[1]
    assert made.banked == (made.tensors[0],)


@pytest.mark.parametrize("scores", [[1.0] * 7, [1.0] * 9, [1.0] * 7 + [float("nan")]])
def test_scores_that_are_not_one_number_each_are_refused(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="expected 8 finite scores"):
        per_expert_plan(plan_of(stack("Q4_K")), {UP: scores})


def test_steps_are_steps() -> None:
    """Down is fewer bits, up is more, and rows that hold the type hold both."""
    for qtype, (lower, higher) in STEPS.items():
        low, own, high = (QUANT_TYPES[name] for name in (lower, qtype, higher))
        assert low.bpw < own.bpw < high.bpw
        assert own.block_size % low.block_size == own.block_size % high.block_size == 0


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["gemma4-additive", "gemma4-moe-8", "qwen3moe-16"])
def test_the_size_is_the_presets(kind: str, preset: str) -> None:
    """Never larger, and smaller by less than the largest step of one expert; maps apart."""
    model = KINDS[kind]
    plan = preset_plan(preset, model, has_imatrix=True)
    chosen = random.Random(0)
    scores = {t.name: [chosen.random() for _ in range(t.shape[0])] for t in rankable(plan)}
    made = per_expert_plan(plan, scores)
    step = max(abs(QUANT_TYPES[other].bpw - QUANT_TYPES[t.qtype].bpw) * t.n_params / t.shape[0] / 8
               for t in rankable(plan) for other in STEPS[t.qtype])  # fmt: skip
    assert 0 <= plan.size_bytes - matrix_bytes(made) < step
    maps = sum(4 * len(t.banks) * t.shape[0] for t in made.banked)
    assert made.size_bytes == matrix_bytes(made) + maps
    assert [t.name for t in made.banked] == [t.name for t in rankable(plan)]
    assert made.edited(plan) == tuple(t.name for t in made.banked)
    made.check(model)
    again = Plan.from_json(made.to_json())
    assert again == made
    assert again.digest() == made.digest() != plan.digest()


# --- the document ----------------------------------------------------------------------------

MODEL = FakeModel("qwen3moe", (FakeTensor(UP, (8, 2, 256)), FakeTensor("output_norm.weight", (2,))))
WHOLE = plan_of(stack("Q4_K"), TensorPlan("output_norm.weight", (2,), "F32", "F32"))
LINE = '"blk.0.ffn_up_exps.weight": {"type": "Q4_K", "shape": [8, 2, 256]'


def with_experts(listed: Any, name: str = UP, **changes: Any) -> str:
    document = json.loads(WHOLE.to_json())
    document["tensors"][name] |= {"experts": listed, **changes}
    return json.dumps(document)


def test_the_line_is_this() -> None:
    banked = WHOLE.tensors[0].with_experts(("Q4_K", "Q6_K", *["Q4_K"] * 5, "Q3_K"))
    plan = dataclasses.replace(WHOLE, tensors=(banked, WHOLE.tensors[1]))
    assert f'{LINE}, "experts": {{"Q6_K": [1], "Q3_K": [7]}}}}' in plan.to_json()
    assert f"{LINE}}}" in WHOLE.to_json()
    assert Plan.from_json(plan.to_json()) == plan


def test_sums_by_hand() -> None:
    """Per expert two rows of one block: Q6_K 210 bytes, Q4_K 144, Q3_K 110; the map 3 × 8 × 4."""
    tensor = Plan.from_json(with_experts({"q6_k": [1], "Q3_K": [0, 7]})).tensors[0]
    assert tensor.banks == {"Q6_K": (1,), "Q4_K": (2, 3, 4, 5, 6), "Q3_K": (0, 7)}
    assert tensor.bytes_by_type == {"Q6_K": 420, "Q4_K": 5 * 288, "Q3_K": 2 * 220}
    assert tensor.size_bytes == 420 + 5 * 288 + 2 * 220 + 96
    assert tensor.own_params == 5 * 512
    assert tensor.n_params == 8 * 512


def test_experts_of_one_type_are_no_banks() -> None:
    everyone = list(range(8))
    plan = Plan.from_json(with_experts({"Q6_K": everyone}))
    assert plan.tensors[0] == stack("Q6_K")
    assert Plan.from_json(with_experts({})) == Plan.from_json(with_experts({"Q6_K": []})) == WHOLE
    assert Plan.from_json(with_experts({"Q4_K": [3]})) == WHOLE
    assert plan.banked == ()


def test_a_fallback_counts_the_experts_that_keep_it() -> None:
    """Five of eight in Q5_0, which costs one bit more than Q4_K: 5 × 192 values, 120 bytes."""
    tensor = TensorPlan(UP, (8, 2, 96), "Q5_0", "Q4_K", "rows of 96")
    plan = plan_of(tensor.with_experts(("Q4_0", "Q8_0", "Q8_0", *["Q5_0"] * 5)))
    (row,) = fallback_rows(plan)
    assert (row.n_params, row.extra_bytes, row.extra_bpw) == (960, 120, 1.0)
    assert row.size_bytes == 5 * 6 * 22
    assert fallback_rows(plan_of(tensor.with_experts(("Q4_0", *["Q8_0"] * 7)))) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (with_experts([1]), r'experts: expected \{"Q6_K": \[0, 1\]\}, found \[1\]'),
        (with_experts({"Q6_K": 1}), r"experts: Q6_K: expected a list of expert numbers, found 1"),
        (with_experts({"Q6_K": [True]}), r"expected a list of expert numbers, found \[True\]"),
        (with_experts({"Q6_K": [8, -1]}), r"experts: \[-1, 8\] of 8 \(from 0\) do not exist"),
        (with_experts({"Q6_K": [1, 2], "Q3_K": [2]}), r"experts: \[2\] listed more than once"),
        (with_experts({"Q6_K": [1], "q6_k": [2]}), r"experts: Q6_K is there twice"),
        (with_experts({"Q7_K": [1]}), r"ffn_up_exps.weight: unknown type 'Q7_K'"),
        (with_experts({"F32": [0]}, "output_norm.weight"), r"only a stack of experts"),
        (with_experts({"Q6_K": [0]}, shape=[2**62, 2, 256]), r"only a stack of experts"),
        (with_experts({"Q6_K": [0]}, shape=[8, 256]), r"only a stack of experts"),
    ],
)
def test_wrong_experts_are_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("listed", "shape", "message"),
    [
        ({"Q6_K": [1]}, (8, 2, 96), r"Q6_K holds blocks of 256, the rows have 96 values; use Q8_0"),
        ({qtype: [e] for e, qtype in enumerate(list(QUANT_TYPES)[:8])}, (9, 2, 256),
         r"experts of 9 types \(F32, .*; a tensor has at most 8 banks"),
    ],
)  # fmt: skip
def test_what_the_rows_cannot_hold_is_refused(
    listed: dict[str, list[int]], shape: tuple[int, ...], message: str
) -> None:
    fitting = "Q4_K" if shape[-1] == 256 else "Q5_0"
    plan = Plan.from_json(with_experts(listed, type=fitting, shape=list(shape)))
    model = dataclasses.replace(MODEL, tensors=(FakeTensor(UP, shape), MODEL.tensors[1]))
    with pytest.raises(PlanError, match=message):
        plan.check(model)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=40), st.sampled_from(sorted(STEPS)))
def test_whatever_the_scores_who_steps_up_outranks_the_others(
    scores: list[float], qtype: str
) -> None:
    plan = plan_of(stack(qtype, len(scores)))
    lower, higher = STEPS[qtype]
    low, own, high = (QUANT_TYPES[name].bpw for name in (lower, qtype, higher))
    if len(scores) // 4 * (own - low) < high - own:
        with pytest.raises(PlanError, match="do not pay for one step up"):
            rankable(plan)
        return
    (made,) = types(plan, {UP: scores})
    by_type = {q: [s for s, own in zip(scores, made, strict=True) if own == q] for q in set(made)}
    assert min(by_type[higher]) >= max(by_type[qtype])
    assert min(by_type[qtype]) >= max(by_type[lower])
    assert len(by_type[higher]) <= len(scores) // 4
    assert len(by_type[lower]) <= len(scores) // 4
