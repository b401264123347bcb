"""The plan as a file: round trip, what editing may break, sums, digest, the report of fallbacks."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moequant.errors import ExportError, PlanError
from moequant.plan import Plan, TensorPlan, fallback_bpw, fallback_rows, preset_plan
from tests.plan.models import KINDS, FakeModel, FakeTensor, qwen3

MODEL = KINDS["gemma4-additive"]
PLAN = preset_plan("Q4_K_M", MODEL, has_imatrix=True)

SMALL = Plan(
    "Q4_K_M",
    "qwen3",
    (
        TensorPlan("token_embd.weight", (64, 256), "Q6_K", "Q6_K"),
        TensorPlan("output_norm.weight", (256,), "F32", "F32"),
        TensorPlan("blk.0.ffn_down.weight", (256, 96), "Q5_0", "Q4_K", "rows of 96"),
    ),
)
SMALL_MODEL = FakeModel("qwen3", tuple(FakeTensor(t.name, t.shape) for t in SMALL.tensors))
SMALL_TEXT = """{
  "version": 1,
  "preset": "Q4_K_M",
  "architecture": "qwen3",
  "base": "BF16",
  "imatrix": false,
  "tensors": {
    "token_embd.weight": {"type": "Q6_K", "shape": [64, 256]},
    "output_norm.weight": {"type": "F32", "shape": [256]},
    "blk.0.ffn_down.weight": {"type": "Q5_0", "shape": [256, 96], "wanted": "Q4_K", "reason": \
"rows of 96"}
  }
}
"""


def edited(edit: Any) -> str:
    """The small plan's text after `edit` changed its JSON in place."""
    document = json.loads(SMALL_TEXT)
    edit(document)
    return json.dumps(document)


def _set(*path: str, to: Any) -> Any:
    def edit(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = to

    return edit


def _remove(*path: str) -> Any:
    def edit(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        del document[path[-1]]

    return edit


DOWN = ("tensors", "blk.0.ffn_down.weight")


def test_the_text_is_this() -> None:
    assert SMALL.to_json() == SMALL_TEXT


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    plan = preset_plan("Q3_K_M", KINDS[kind], has_imatrix=False, base="F16")
    plan.write(tmp_path / "plan.json")
    again = Plan.read(tmp_path / "plan.json")
    assert again == plan
    assert again.digest() == plan.digest()
    again.check(KINDS[kind])
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_sums_by_hand() -> None:
    """Q6_K: 210 bytes per 256; Q5_0: 22 bytes per 32."""
    assert SMALL.size_bytes == 64 * 210 + 256 * 4 + 256 * 3 * 22
    assert SMALL.n_params == 64 * 256 + 256 + 256 * 96
    assert SMALL.bpw == 8 * SMALL.size_bytes / SMALL.n_params
    assert SMALL.types["blk.0.ffn_down.weight"] == "Q5_0"


def test_fallbacks_by_hand() -> None:
    """Q4_K is 4.5 bits, Q5_0 5.5: one bit for each of 24576 weights."""
    (row,) = fallback_rows(SMALL)
    assert (row.role, row.wanted, row.qtype, row.reason) == (
        "ffn_down",
        "Q4_K",
        "Q5_0",
        "rows of 96",
    )
    assert row.tensors == ("blk.0.ffn_down.weight",)
    assert (row.extra_bpw, row.extra_bytes, row.size_bytes) == (1.0, 24576 / 8, 16896)
    assert fallback_bpw(SMALL) == pytest.approx(24576 / SMALL.n_params)
    assert SMALL.fallbacks == (SMALL.tensors[2],)


def test_fallbacks_are_one_row_per_kind() -> None:
    rows = fallback_rows(PLAN)
    assert [(row.role, row.wanted, row.qtype, len(row.tensors)) for row in rows] == [
        ("ffn_down_exps", "Q6_K", "Q8_0", 8),
        ("ffn_down_exps", "Q4_K", "Q5_0", 8),
    ]
    assert sum(len(row.tensors) for row in rows) == len(PLAN.fallbacks)


def test_nothing_fell_back() -> None:
    plan = preset_plan("Q4_K_M", qwen3(tied=False), has_imatrix=False)
    assert (plan.fallbacks, fallback_rows(plan), fallback_bpw(plan)) == ((), [], 0.0)


def test_an_output_whose_rows_do_not_fit_is_reported() -> None:
    """llama-quantize makes it Q8_0 without a word."""
    plan = preset_plan("Q4_K_M", qwen3(tied=True, hidden=288), has_imatrix=False)
    assert ("token_embd", "Q6_K", "Q8_0") in [
        (row.role, row.wanted, row.qtype) for row in fallback_rows(plan)
    ]


def test_an_edited_type_is_read() -> None:
    def edit(document: Any) -> None:
        document["tensors"]["token_embd.weight"]["type"] = "Q8_0"

    plan = Plan.from_json(edited(edit))
    assert plan.types["token_embd.weight"] == "Q8_0"
    assert plan.digest() != SMALL.digest()
    assert not plan.tensors[0].is_fallback


@pytest.mark.parametrize("qtype", ["Q8_0", "F16", "IQ4_NL"])
def test_a_fallback_that_was_edited_is_a_choice(qtype: str) -> None:
    """The old type and reason do not explain the new type."""
    plan = Plan.from_json(edited(_set(*DOWN, "type", to=qtype)))
    assert plan.tensors[2] == TensorPlan("blk.0.ffn_down.weight", (256, 96), qtype, qtype)
    assert fallback_rows(plan) == []
    assert "wanted" not in plan.to_json()


def test_a_reason_without_a_fallback_is_dropped() -> None:
    text = edited(_set(*DOWN, "wanted", to="Q5_0"))
    assert Plan.from_json(text).tensors[2].reason == ""


def test_the_tensors_that_were_edited() -> None:
    plan = Plan.from_json(edited(_set("tensors", "token_embd.weight", "type", to="q8_0")))
    assert plan.edited(SMALL) == ("token_embd.weight",)
    assert SMALL.edited(SMALL) == Plan.from_json(SMALL_TEXT).edited(SMALL) == ()
    fewer = dataclasses.replace(SMALL, tensors=SMALL.tensors[:2])
    assert SMALL.edited(fewer) == ("blk.0.ffn_down.weight",)
    assert fewer.edited(SMALL) == ()


def test_the_digest_sees_every_field() -> None:
    others = [
        dataclasses.replace(SMALL, preset="Q4_K_S"),
        dataclasses.replace(SMALL, architecture="qwen3moe"),
        dataclasses.replace(SMALL, base="F16"),
        dataclasses.replace(SMALL, has_imatrix=True),
        dataclasses.replace(SMALL, tensors=SMALL.tensors[::-1]),
        dataclasses.replace(SMALL, tensors=SMALL.tensors[:2]),
    ]
    assert len({plan.digest() for plan in [SMALL, *others]}) == 7
    assert SMALL.digest() == Plan.from_json(SMALL_TEXT.replace("\n", " ")).digest()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("version", to=2), r"plan version 2; this moequant reads version 1"),
        (_set("version", to=True), r"plan version True"),
        (_remove("version"), r"plan version None"),
        (_set("tensors", to=[]), r"not a plan"),
        (_set("preset", to="Q9"), r"preset: unknown 'Q9'; known: F32"),
        (_set("preset", to=None), r"preset: expected text, found None"),
        (_set("imatrix", to="yes"), r"imatrix: expected true or false, found 'yes'"),
        (_set("base", to="Q8_0"), r"base: 'Q8_0' is not one of F32, F16, BF16"),
        (_set("target", to=3), r"target: no such field; remove it"),
        (_set(*DOWN, to="Q4_K"), r"expected \{\"type\": …, \"shape\": …\}, found 'Q4_K'"),
        (
            _set(*DOWN, "type", to="Q7_K"),
            r"ffn_down.weight: unknown type 'Q7_K'\nA type is one of F32, F16",
        ),
        (_set(*DOWN, "type", to=7), r"ffn_down.weight: type: expected text, found 7"),
        (_set(*DOWN, "wanted", to="Q7_K"), r"wanted: unknown type 'Q7_K'"),
        (_set(*DOWN, "expert", to=[1]), r"no such field: expert; remove it"),
        (_set(*DOWN, "shape", to=[256, -96]), r"positive integers, found \[256, -96\]"),
        (_set(*DOWN, "shape", to=[]), r"positive integers, found \[\]"),
        (_set(*DOWN, "shape", to=[True, 32]), r"positive integers, found \[True, 32\]"),
        (_remove(*DOWN, "type"), r"ffn_down.weight: type is missing"),
        (_remove(*DOWN, "shape"), r"ffn_down.weight: shape is missing"),
    ],
)
def test_wrong_plans_are_refused(edit: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_json(edited(edit), "plan.json")
    assert str(caught.value).startswith("plan.json: ")


def test_one_error_lists_all_offenders() -> None:
    def edit(document: Any) -> None:
        document["tensors"]["token_embd.weight"]["type"] = "Q7_K"
        document["tensors"]["blk.0.ffn_down.weight"]["type"] = "Q3"

    with pytest.raises(PlanError, match="2 wrong in the plan") as caught:
        Plan.from_json(edited(edit))
    assert "token_embd.weight: unknown type 'Q7_K'" in str(caught.value)
    assert "blk.0.ffn_down.weight: unknown type 'Q3'" in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            _set(*DOWN, "type", to="Q6_K"),
            r"1 offenders:\n.*Q6_K holds blocks of 256, the rows have 96 values; use Q8_0",
        ),
        (
            _set("tensors", "output_norm.weight", "type", to="Q8_0"),
            r"1 offenders:\n.*output_norm.weight: Q8_0: vectors, norms and scales must be F32",
        ),
        (
            _set("tensors", "token_embd.weight", "shape", to=[64, 100]),
            r"1 offenders:\n.*token_embd.weight: shape \[64, 100\] in the plan, \[64, 256\] in",
        ),
        (
            _set("tensors", "output_norm.weight", "shape", to=[2, 128]),
            r"1 offenders:\n.*output_norm.weight: shape \[2, 128\] in the plan, \[256\] in the",
        ),
    ],
)
def test_what_the_model_cannot_have_is_refused(edit: Any, message: str) -> None:
    """An edited shape is what is wrong, not the type that does not go with it."""
    with pytest.raises(PlanError, match=message):
        Plan.from_json(edited(edit)).check(SMALL_MODEL)


def test_names_are_read_in_any_case() -> None:
    lower = SMALL_TEXT.replace("Q", "q").replace("F", "f").replace("_K", "_k")
    assert Plan.from_json(lower) == SMALL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"not JSON at line 1, column 1"),
        ("[]", r"not a plan"),
        ("null", r"not a plan"),
        ('{"version": 1,\n "tensors": {}', r"not JSON at line 2"),
        ('{"version": 1, "tensors": {"a": {}, "b": {}, "a": {}}}', r"named twice.*\n  - a"),
        ("[" * 100_000, r"plan"),
        ('{"version": ' + "1" * 5000 + ', "tensors": {}}', r"plan"),
    ],
)
def test_what_is_not_a_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)


@given(st.text(alphabet='{}[]":,0123456789truefalsn \n', max_size=60))
def test_no_text_raises_anything_else(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_a_plan_of_another_model_is_refused_with_all_differences() -> None:
    plan = dataclasses.replace(
        PLAN,
        architecture="qwen3moe",
        tensors=(
            dataclasses.replace(PLAN.tensors[0], shape=(64, 512)),
            TensorPlan("blk.99.attn_q.weight", (256, 256), "Q4_K", "Q4_K"),
            *PLAN.tensors[2:],
        ),
    )
    with pytest.raises(PlanError, match="4 offenders") as caught:
        plan.check(MODEL)
    for part in (
        "architecture: qwen3moe in the plan, gemma4 in the model",
        "token_embd.weight: shape [64, 512] in the plan, [64, 256] in the model",
        "blk.99.attn_q.weight: not in the model; remove the line",
        f"{PLAN.tensors[1].name}: in the model, not in the plan; add it",
    ):
        assert part in str(caught.value)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.json: the plan cannot be read: No such file"):
        Plan.read(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"GGUF\xff\xfe")
    with pytest.raises(PlanError, match=r"byte 4 is not UTF-8 text"):
        Plan.read(tmp_path / "binary.json")
    with pytest.raises(ExportError, match=r"was not written: No such file"):
        SMALL.write(tmp_path / "nowhere" / "plan.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExportError, match=r"was not written"):
        SMALL.write(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["binary.json", "folder"]


def test_a_failed_write_keeps_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    SMALL.write(path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ExportError, match="No space left on device"):
        PLAN.write(path)
    assert Plan.read(path) == SMALL
    assert list(tmp_path.iterdir()) == [path]
