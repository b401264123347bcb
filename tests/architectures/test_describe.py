"""`describe`: what it tells of a model, and that it accounts for every name both ways."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gguf
import pytest
import torch

from moequant.architectures import FAMILIES, ModelSpec, TensorSpec, converter_type, describe
from moequant.architectures.family import Family
from moequant.checkpoint import Checkpoint, TensorInfo
from moequant.errors import ArchitectureError, CheckpointError, MoequantError


def _tensor(spec: ModelSpec, name: str) -> TensorSpec:
    return next(tensor for tensor in spec.tensors if tensor.name == name)


def _without(checkpoint: Checkpoint, *names: str) -> Checkpoint:
    kept = {name: info for name, info in checkpoint.tensors.items() if name not in names}
    assert len(kept) == len(checkpoint.tensors) - len(names)
    return replace(checkpoint, tensors=kept)


def _with(checkpoint: Checkpoint, **infos: TensorInfo) -> Checkpoint:
    return replace(checkpoint, tensors={**checkpoint.tensors, **infos})


def _like(checkpoint: Checkpoint, name: str, **changes: Any) -> TensorInfo:
    return replace(next(iter(checkpoint.tensors.values())), name=name, **changes)


def _configured(checkpoint: Checkpoint, changes: Mapping[str, Any]) -> Checkpoint:
    return replace(checkpoint, config={**checkpoint.config, **changes})


# --- what it tells ---------------------------------------------------------------------------


def test_additive_moe(gemma: Checkpoint) -> None:
    spec = describe(gemma)
    assert (spec.architecture, spec.prefix, spec.left_out) == ("gemma4", "model.", ())
    assert (spec.block_count, spec.moe_layers) == (4, (1, 3))
    assert (spec.expert_count, spec.expert_used_count) == (16, 4)
    assert (spec.head_count, spec.head_count_kv) == (8, (4, 2, 4, 2))
    assert (spec.hidden_size, spec.vocab_size, spec.context_length) == (256, 640, 2048)
    assert spec.tied_embeddings
    assert spec.config["per_layer_config"]["1"]["head_dim"] == 64

    experts = _tensor(spec, "blk.3.ffn_gate_up_exps.weight")
    assert experts.shape == (16, 192, 256)
    assert experts.sources == ("model.layers.3.experts.gate_up_proj",)
    assert (experts.bid, experts.role) == (3, "ffn_gate_up_exps")
    assert (experts.n_matrices, experts.is_expert) == (16, True)
    scale = _tensor(spec, "blk.3.ffn_down_exps.scale")
    assert (scale.role, scale.shape) == ("ffn_down_exps.scale", (16,))
    assert (scale.n_matrices, scale.is_expert) == (1, False)


def test_conditional_generation(conditional: Checkpoint) -> None:
    spec = describe(conditional)
    assert spec.prefix == "model.language_model."
    assert spec.moe_layers == ()
    assert spec.expert_count == spec.expert_used_count == 0
    towers = {name.split(".")[1] for name in spec.left_out}
    assert towers == {"vision_tower", "audio_tower", "embed_vision", "embed_audio"}
    assert spec.config["hidden_size_per_layer_input"] == 128
    names = {tensor.name for tensor in spec.tensors}
    assert "blk.3.attn_v.weight" in names
    assert not names & {f"blk.{bid}.attn_{part}.weight" for bid in (4, 5) for part in "kv"}


def test_qwen3_moe(qwen: Checkpoint) -> None:
    spec = describe(qwen)
    assert (spec.architecture, spec.moe_layers, spec.tied_embeddings) == ("qwen3moe", (0, 1), False)
    experts = _tensor(spec, "blk.1.ffn_down_exps.weight")
    assert experts.shape == (8, 256, 96)
    assert experts.sources[7] == "model.layers.1.mlp.experts.7.down_proj.weight"


def test_every_name_is_somebodys_once(
    gemma: Checkpoint, conditional: Checkpoint, qwen: Checkpoint
) -> None:
    for checkpoint in (gemma, conditional, qwen):
        spec = describe(checkpoint)
        sources = [source for tensor in spec.tensors for source in tensor.sources]
        assert len(sources) > 50
        assert sorted([*sources, *spec.left_out]) == sorted(checkpoint.tensors)
        assert len({tensor.name for tensor in spec.tensors}) == len(spec.tensors)


def test_file_order(gemma: Checkpoint, qwen: Checkpoint) -> None:
    for checkpoint, last in ((gemma, "output_norm.weight"), (qwen, "output.weight")):
        tensors = describe(checkpoint).tensors
        bids = [tensor.bid for tensor in tensors if tensor.bid is not None]
        assert bids == sorted(bids)
        assert (tensors[0].name, tensors[-1].name) == ("token_embd.weight", last)


def test_older_prefix(conditional: Checkpoint) -> None:
    renamed = {
        name.replace("model.language_model.", "language_model.model."): info
        for name, info in conditional.tensors.items()
    }
    spec = describe(replace(conditional, tensors=renamed))
    assert spec.prefix == "language_model.model."
    assert spec.tensors[0].sources == ("language_model.model.embed_tokens.weight",)


# --- values ----------------------------------------------------------------------------------


def test_rope_freqs_by_hand(gemma: Checkpoint) -> None:
    """Heads of 64 with a quarter rotated: 8 of 32 frequencies."""
    values = _tensor(describe(gemma), "rope_freqs.weight").load(gemma)
    assert values.dtype == torch.float32
    assert values.tolist() == [1.0] * 8 + [torch.tensor(1e30).item()] * 24


def test_load_gives_the_checkpoints_values(gemma: Checkpoint, qwen: Checkpoint) -> None:
    for checkpoint in (gemma, qwen):
        for tensor in describe(checkpoint).tensors:
            values = tensor.load(checkpoint)
            assert tuple(values.shape) == tensor.shape
            if tensor.sources:
                assert values.dtype == torch.bfloat16
    stack = _tensor(describe(qwen), "blk.0.ffn_up_exps.weight").load(qwen)
    for expert in range(8):
        single = qwen.read(f"model.layers.0.mlp.experts.{expert}.up_proj.weight")
        assert torch.equal(stack[expert], single)


def test_one_matrix_reads_one_matrix(gemma: Checkpoint, qwen: Checkpoint) -> None:
    cases = (
        (gemma, "blk.1.ffn_down_exps.weight", "model.layers.1.experts.down_proj"),
        (qwen, "blk.1.ffn_down_exps.weight", "model.layers.1.mlp.experts.5.down_proj.weight"),
    )
    for checkpoint, name, source in cases:
        tensor = _tensor(describe(checkpoint), name)
        whole = tensor.load(checkpoint)
        only = replace(checkpoint, tensors={source: checkpoint.tensors[source]})
        matrix = tensor.load(only, 5)
        assert torch.equal(matrix, whole[5])
        assert matrix.untyped_storage().nbytes() == matrix.nbytes


def test_a_matrix_that_is_not_there(gemma: Checkpoint) -> None:
    spec = describe(gemma)
    for name, matrix in (("token_embd.weight", 0), ("blk.1.ffn_down_exps.weight", 16)):
        with pytest.raises(ValueError, match="has no matrix"):
            _tensor(spec, name).load(gemma, matrix)


# --- offenders -------------------------------------------------------------------------------


def test_one_error_lists_all_offenders(gemma: Checkpoint) -> None:
    norm, down = "model.norm.weight", "model.layers.1.experts.down_proj"
    spoiled = _with(
        _without(gemma, norm, "model.layers.0.layer_scalar"),
        **{
            down: _like(gemma, down, shape=(15, 256, 96)),
            "model.layers.2.mystery": _like(gemma, "model.layers.2.mystery"),
            "model.embed_tokens.weight": replace(
                gemma.tensors["model.embed_tokens.weight"], dtype=torch.uint8
            ),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        describe(spoiled)
    text = str(caught.value)
    for line in (
        "5 tensors are not what config.json describes",
        "model.norm.weight: missing, of shape [256]",
        "model.layers.0.layer_scalar: missing, of shape [1]",
        "model.layers.1.experts.down_proj: shape [15, 256, 96], expected [16, 256, 96]",
        "model.layers.2.mystery: unexpected",
        "model.embed_tokens.weight: dtype torch.uint8",
    ):
        assert line in text


def test_an_expert_too_few_and_one_too_many(qwen: Checkpoint) -> None:
    extra = "model.layers.0.mlp.experts.8.up_proj.weight"
    spoiled = _with(
        _without(qwen, "model.layers.1.mlp.experts.7.gate_proj.weight"),
        **{extra: _like(qwen, extra, shape=(96, 256))},
    )
    with pytest.raises(CheckpointError) as caught:
        describe(spoiled)
    assert "model.layers.1.mlp.experts.7.gate_proj.weight: missing" in str(caught.value)
    assert f"{extra}: unexpected" in str(caught.value)


def test_experts_without_their_router(gemma: Checkpoint) -> None:
    with pytest.raises(CheckpointError) as caught:
        describe(_without(gemma, "model.layers.1.router.proj.weight"))
    text = str(caught.value)
    assert "8 tensors" not in text
    assert "7 tensors" in text
    assert "model.layers.1.experts.gate_up_proj: unexpected (its layer has no router.proj" in text


def test_a_router_without_its_experts(gemma: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"layers\.1\.experts\.down_proj: missing"):
        describe(_without(gemma, "model.layers.1.experts.down_proj"))


def test_no_layer_has_experts(gemma: Checkpoint) -> None:
    marks = (".router.", ".experts.", "feedforward_layernorm_1.", "feedforward_layernorm_2.")
    parts = [name for name in gemma.tensors if any(mark in name for mark in marks)]
    with pytest.raises(CheckpointError, match="16 experts, but no layer has a router"):
        describe(_without(gemma, *parts))
    dense = describe(_configured(_without(gemma, *parts), {"enable_moe_block": False}))
    assert (dense.expert_count, dense.moe_layers) == (0, ())


def test_values_where_keys_serve_as_values(gemma: Checkpoint) -> None:
    """llama.cpp would use the v_proj that transformers ignores: two different models."""
    name = "model.layers.1.self_attn.v_proj.weight"
    with pytest.raises(
        CheckpointError, match=r"v_proj\.weight: unexpected \(with attention_k_eq_v"
    ):
        describe(_with(gemma, **{name: _like(gemma, name, shape=(128, 256))}))


def test_not_a_text_model(gemma: Checkpoint) -> None:
    odd = {f"transformer.{name}": info for name, info in gemma.tensors.items()}
    with pytest.raises(CheckpointError, match=r"none of .*model\.layers"):
        describe(replace(gemma, tensors=odd))


# --- configurations --------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gemma4_unified", None, 7, ["gemma4"]])
def test_unknown_model_type(gemma: Checkpoint, model_type: Any) -> None:
    with pytest.raises(ArchitectureError, match="gemma4, gemma4_text, qwen3, qwen3_moe"):
        describe(_configured(gemma, {"model_type": model_type}))


GEMMA_VARIANTS = [
    ({"attention_bias": True}, "attention_bias"),
    ({"hidden_activation": "silu"}, "hidden_activation"),
    ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
    ({"num_kv_shared_layers": 3}, "num_kv_shared_layers is 3"),
    ({"num_kv_shared_layers": 9}, "num_kv_shared_layers is 9"),
    ({"num_hidden_layers": 513}, "at most 512"),
    ({"num_experts": 1025}, "at most 1024"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    ({"per_layer_config": {"1": {"head_dim": 64}, "3": {"head_dim": 32}}}, "layer 3"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}}, "rope"),
]
QWEN_VARIANTS = [
    ({"norm_topk_prob": False}, "norm_topk_prob is False"),
    ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ({"mlp_only_layers": [0]}, "mlp_only_layers"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}}, "dynamic"),
]


@pytest.mark.parametrize(("changes", "text"), GEMMA_VARIANTS)
def test_gemma_variants_that_would_run_wrong(
    gemma: Checkpoint, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ArchitectureError, match=text):
        describe(_configured(gemma, changes))


@pytest.mark.parametrize(("changes", "text"), QWEN_VARIANTS)
def test_qwen_variants_that_would_run_wrong(
    qwen: Checkpoint, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ArchitectureError, match=text):
        describe(_configured(qwen, changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": "4"},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 0},
        {"num_experts": True},
        {"hidden_size": -256},
        {"hidden_size": 1 << 70},
        {"num_attention_heads": 0},
        {"layer_types": ["full_attention"]},
        {"layer_types": 5},
        {"per_layer_config": {"x": 3}},
        {"per_layer_config": {"1": 3}},
        {"per_layer_config": {"77": {"head_dim": 64}}},
        {"rope_parameters": {"full_attention": 5}},
        {"rope_parameters": 5},
        {"moe_intermediate_size": None},
        {"top_k_experts": 17},
        {"top_k_experts": None},
        {"text_config": [1]},
        {"quantization_config": "x"},
        {"num_key_value_heads": None},
    ],
)
def test_senseless_configurations(gemma: Checkpoint, changes: dict[str, Any]) -> None:
    with pytest.raises(MoequantError) as caught:
        describe(_configured(gemma, changes))
    assert caught.value.exit_code == 2


# --- the table -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_names_are_ggufs(family: Family) -> None:
    """Each row's GGUF name is one that gguf knows for the architecture."""
    (arch,) = (a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]}
    for row in (*family.first, *family.last):
        assert row.gguf.rsplit(".", 1)[0] in known
    for row in family.layer:
        assert f"blk.{{bid}}.{row.gguf.rsplit('.', 1)[0]}" in known


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("token_embd.weight", (640, 256), "BF16"),
        ("blk.11.ffn_down_exps.weight", (16, 256, 96), "BF16"),
        ("per_layer_model_proj.weight", (768, 256), "BF16"),
        ("blk.11.ffn_gate_inp.weight", (16, 256), "F32"),
        ("blk.0.ffn_gate_inp.scale", (256,), "F32"),
        ("blk.0.ffn_down_exps.scale", (16, 1), "F32"),
        ("blk.0.attn_norm.weight", (1, 256), "F32"),
        ("rope_freqs.weight", (32,), "F32"),
        ("blk.0.inp_gate.weight", (128, 256), "BF16"),
    ],
)
def test_converter_type(name: str, shape: tuple[int, ...], expected: str) -> None:
    role = name.split(".", 2)[-1]
    spec = TensorSpec(name, shape, (), None, role, 1, False, FAMILIES[0].layer[0].op)
    assert converter_type(spec, "BF16") == expected
    assert converter_type(spec, "F32") == "F32"


def test_the_package_imports_no_torch() -> None:
    code = "import sys, moequant.architectures; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
