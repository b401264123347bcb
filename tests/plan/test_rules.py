"""The rule book on cases small enough to work out by hand; llama-quantize itself is the oracle in
`tests/oracles/test_presets.py`."""

import dataclasses
import subprocess
import sys

import pytest

from moequant.errors import PlanError
from moequant.plan import PRESETS, preset_plan
from moequant.plan.presets import Preset
from moequant.plan.rules import Choice, choose_types
from tests.plan.models import (
    KINDS,
    FakeModel,
    FakeTensor,
    attention,
    dense_ffn,
    embeddings,
    fake_model,
    qwen3,
    qwen3_moe,
)


def types(preset: str, model: FakeModel, has_imatrix: bool = False) -> dict[str, str]:
    """Final types by tensor name."""
    return preset_plan(preset, model, has_imatrix=has_imatrix).types


def role_types(found: dict[str, str], role: str, layers: int = 16) -> list[str]:
    """Types of one role, layer by layer."""
    return [found[f"blk.{bid}.{role}.weight"] for bid in range(layers)]


def test_the_presets_are_those_of_the_issue() -> None:
    names = (
        "F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_0 Q4_K_M Q4_K_S Q4_0 Q3_K_L Q3_K_M Q3_K_S Q2_K "
        "IQ4_XS IQ4_NL MXFP4_MOE"
    )
    assert set(PRESETS) == set(names.split())
    assert all(name == preset.name and preset.description for name, preset in PRESETS.items())


def test_q4_k_m_gives_every_third_layer_more_bits() -> None:
    found = types("Q4_K_M", qwen3(tied=False))
    more = "Q6_K"  # layers 0-1 and 14-15, and 2 + 2, 5, 8 ... between
    expected = [more if bid in (0, 1, 4, 7, 10, 13, 14, 15) else "Q4_K" for bid in range(16)]
    assert role_types(found, "ffn_down") == expected
    assert role_types(found, "attn_v") == expected
    assert set(role_types(found, "attn_k") + role_types(found, "attn_output")) == {"Q4_K"}
    assert (found["output.weight"], found["token_embd.weight"]) == ("Q6_K", "Q4_K")
    assert found["output_norm.weight"] == "F32"


def test_tied_embeddings_get_the_type_of_the_output() -> None:
    assert types("Q4_K_M", qwen3(tied=True))["token_embd.weight"] == "Q6_K"


def test_layers_without_attn_v_do_not_count() -> None:
    """Q4_K_S gives the first four attn_v Q5_K: with none in layer 1, those of 0, 2, 3 and 4."""
    layer = attention(256, 4, 2) | dense_ffn(256, 512)
    layers = [dict(layer) for _ in range(16)]
    del layers[1]["attn_v.weight"]
    found = types("Q4_K_S", fake_model("gemma4", layers, embeddings(256, tied=True)))
    assert "blk.1.attn_v.weight" not in found
    values = [bid for bid in range(16) if found.get(f"blk.{bid}.attn_v.weight") == "Q5_K"]
    assert values == [0, 2, 3, 4]


def test_the_order_of_the_file_changes_nothing() -> None:
    model = qwen3(tied=False)
    backwards = dataclasses.replace(model, tensors=tuple(reversed(model.tensors)))
    assert types("Q4_K_M", model) == types("Q4_K_M", backwards)


def test_eight_experts_are_special() -> None:
    eight, sixteen = (types("Q4_K_M", qwen3_moe(experts=n, tied=False)) for n in (8, 16))
    assert set(role_types(eight, "attn_v") + role_types(eight, "attn_k")) == {"Q8_0"}
    assert set(role_types(eight, "attn_output")) == {"Q5_K"}
    assert set(role_types(sixteen, "attn_k") + role_types(sixteen, "attn_output")) == {"Q4_K"}


def test_importance_data_changes_q4_0() -> None:
    plain, weighted = (types("Q4_0", qwen3(tied=False), has) for has in (False, True))
    assert set(role_types(plain, "ffn_down")) == {"Q4_0"}
    assert role_types(weighted, "ffn_down")[:3] == ["Q4_1", "Q4_1", "Q4_0"]


@pytest.mark.parametrize(
    ("preset", "wanted", "final"),
    [
        ("Q2_K", "Q3_K", "Q4_0"),
        ("Q3_K_S", "Q3_K", "Q4_0"),
        ("Q4_K_S", "Q4_K", "Q5_0"),
        ("Q5_K_S", "Q5_K", "Q5_1"),
        ("Q6_K", "Q6_K", "Q8_0"),
        ("IQ4_XS", "IQ4_XS", "IQ4_NL"),
        ("Q8_0", "Q8_0", "Q8_0"),
        ("Q4_0", "Q4_0", "Q4_0"),
    ],
)
def test_rows_of_96_fall_back(preset: str, wanted: str, final: str) -> None:
    plan = preset_plan(preset, qwen3_moe(experts=16, tied=False), has_imatrix=True)
    tensor = next(t for t in plan.tensors if t.name == "blk.8.ffn_down_exps.weight")
    assert (tensor.wanted, tensor.qtype) == (wanted, final)
    expected = "rows of 96 are not whole blocks of 256" if wanted != final else ""
    assert tensor.reason == expected


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("F32", "BF16")])
def test_rows_of_40_are_f16(preset: str) -> None:
    """32 does not divide 40: no quantized type holds such rows."""
    layer = attention(256, 4, 2) | dense_ffn(256, 40)
    model = fake_model("qwen3", [layer] * 16, embeddings(256, tied=False))
    assert set(role_types(types(preset, model), "ffn_down")) == {"F16"}


def test_a_matrix_of_one_row_is_a_vector() -> None:
    """ggml sees no second dimension; the converter, which counts numpy's, writes no F32."""
    model = fake_model("qwen3", [{"attn_q.weight": (1, 256)}], embeddings(256, tied=False))
    assert types("Q4_K_M", model)["blk.0.attn_q.weight"] == "BF16"


def test_mxfp4_is_for_stacks_of_experts() -> None:
    found = types("MXFP4_MOE", qwen3_moe(experts=16, tied=False))
    quantized = {name: qtype for name, qtype in found.items() if qtype != "F32"}
    assert {name for name, qtype in quantized.items() if qtype == "MXFP4"} == {
        name for name in quantized if "_exps" in name
    }
    assert {qtype for name, qtype in quantized.items() if "_exps" not in name} == {"Q8_0"}


def chosen(preset: Preset, model: FakeModel, has_imatrix: bool) -> dict[str, Choice]:
    """Types under a preset that need not be in the table."""
    base_types = {tensor.name: "F32" for tensor in model.tensors}
    return choose_types(preset, model, base_types, has_imatrix=has_imatrix)


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if not preset.is_float])
def test_every_rule_of_a_preset_decides_somewhere(name: str) -> None:
    """Without any one rule of the table, a type of these models changes: the oracle sees it."""
    preset = PRESETS[name]
    for group in ("attn_v", "attn_output", "ffn_down"):
        rules = getattr(preset, group)
        for i, rule in enumerate(rules):
            fewer = dataclasses.replace(preset, **{group: rules[:i] + rules[i + 1 :]})
            assert any(
                chosen(preset, model, has_imatrix) != chosen(fewer, model, has_imatrix)
                for model in KINDS.values()
                for has_imatrix in (False, True)
            ), (group, rule)


def test_preset_names_in_any_case() -> None:
    assert preset_plan("q4_k_m", qwen3(tied=True), has_imatrix=False).preset == "Q4_K_M"


def test_unknown_presets_and_bases_are_refused() -> None:
    with pytest.raises(PlanError, match=r"unknown preset 'Q7_K'; known: F32, F16"):
        preset_plan("Q7_K", qwen3(tied=True), has_imatrix=False)
    with pytest.raises(PlanError, match=r"base 'Q8_0': not one of F32, F16, BF16"):
        preset_plan("Q4_K_M", qwen3(tied=True), has_imatrix=False, base="Q8_0")


def test_a_tensor_outside_the_layers_of_an_expert_model_is_refused() -> None:
    model = qwen3_moe(experts=16, tied=True)
    stray = FakeTensor("blk.16.ffn_down_exps.weight", (16, 256, 96))
    with pytest.raises(PlanError, match=r"blk\.16\.ffn_down_exps.* 16 layers"):
        types("Q4_K_M", dataclasses.replace(model, tensors=(*model.tensors, stray)))


def test_float_presets_take_the_converters_types() -> None:
    found = types("BF16", KINDS["gemma4-ple"])
    assert found["per_layer_model_proj.weight"] == "BF16"
    assert found["blk.0.attn_norm.weight"] == "F32"
    assert types("F16", KINDS["gemma4-additive"])["blk.0.ffn_gate_inp.weight"] == "F32"


def test_the_planner_imports_no_torch() -> None:
    code = "import sys, moequant.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
