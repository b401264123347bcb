"""Models as the planner sees them, names and shapes, and GGUF files that llama-quantize accepts.

Owns: one small model per shape of the rule book, deep enough (16 layers) that an eighth, a
sixteenth and every third layer differ. Written from llama.cpp's tensor names, without moequant's
architectures, so that planner and test do not share a mistake. A file has real metadata and a
hole for data: llama-quantize reads no values to choose types, and zeros otherwise.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

LAYERS = 16
VOCABULARY = 64


@dataclass(frozen=True)
class FakeTensor:
    """Name and torch shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FakeModel:
    """Satisfies `moequant.plan.Model`; `keys` are the GGUF keys that llama.cpp asks for."""

    architecture: str
    tensors: tuple[FakeTensor, ...]
    block_count: int = LAYERS
    expert_count: int = 0
    head_count: int = 4
    head_count_kv: tuple[int, ...] = (2,) * LAYERS
    hidden_size: int = 256
    keys: dict[str, Any] = field(default_factory=dict)


Shapes = dict[str, tuple[int, ...]]


def fake_model(
    architecture: str,
    layers: Sequence[Shapes],
    outside: Shapes,
    expert_count: int = 0,
    head_count: int = 4,
    head_count_kv: Sequence[int] = (2,) * LAYERS,
    hidden_size: int = 256,
    keys: dict[str, Any] | None = None,
) -> FakeModel:
    """A model of these layers; tensors outside layers first, as converters write them."""
    named = dict(outside)
    for bid, layer in enumerate(layers):
        named |= {f"blk.{bid}.{name}": shape for name, shape in layer.items()}
    tensors = tuple(FakeTensor(name, shape) for name, shape in named.items())
    return FakeModel(
        architecture,
        tensors,
        len(layers),
        expert_count,
        head_count,
        tuple(head_count_kv),
        hidden_size,
        keys or {},
    )


def attention(hidden: int, heads: int, kv_heads: int, head_dim: int = 64) -> Shapes:
    """One layer's attention, with norms of query and key."""
    return {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (heads * head_dim, hidden),
        "attn_k.weight": (kv_heads * head_dim, hidden),
        "attn_v.weight": (kv_heads * head_dim, hidden),
        "attn_output.weight": (hidden, heads * head_dim),
        "attn_q_norm.weight": (head_dim,),
        "attn_k_norm.weight": (head_dim,),
    }


def dense_ffn(hidden: int, width: int, suffix: str = "") -> Shapes:
    """One layer's MLP; suffix `_shexp` for shared experts."""
    return {
        "ffn_norm.weight": (hidden,),
        f"ffn_gate{suffix}.weight": (width, hidden),
        f"ffn_up{suffix}.weight": (width, hidden),
        f"ffn_down{suffix}.weight": (hidden, width),
    }


def expert_ffn(hidden: int, width: int, experts: int, *, fused: bool = False) -> Shapes:
    """One layer's router and routed experts; `fused`: gate and up in one tensor."""
    rows = {"gate_up": 2 * width} if fused else {"gate": width, "up": width}
    return {
        "ffn_gate_inp.weight": (experts, hidden),
        **{f"ffn_{kind}_exps.weight": (experts, n, hidden) for kind, n in rows.items()},
        "ffn_down_exps.weight": (experts, hidden, width),
    }


def gemma4(
    *,
    experts: int = 0,
    moe_width: int = 96,
    moe_layers: range = range(LAYERS),
    per_layer: int = 0,
    hidden: int = 256,
    width: int = 512,
) -> FakeModel:
    """Gemma 4: every sixth layer attends fully and has no attn_v; experts beside the dense MLP."""
    layers = []
    kv_heads = tuple(1 if bid % 6 == 5 else 2 for bid in range(LAYERS))
    for bid in range(LAYERS):
        layer = attention(hidden, 4, kv_heads[bid]) | dense_ffn(hidden, width)
        layer |= {"post_attention_norm.weight": (hidden,), "layer_output_scale.weight": (1,)}
        if bid % 6 == 5:
            del layer["attn_v.weight"]
        if experts and bid in moe_layers:
            layer |= expert_ffn(hidden, moe_width, experts, fused=True)
            layer |= {"ffn_gate_inp.scale": (hidden,), "ffn_down_exps.scale": (experts,)}
            layer |= {"post_ffw_norm_1.weight": (hidden,), "post_ffw_norm_2.weight": (hidden,)}
        if per_layer:
            layer |= {"inp_gate.weight": (per_layer, hidden), "proj.weight": (hidden, per_layer)}
        layers.append(layer)
    outside: Shapes = {"token_embd.weight": (VOCABULARY, hidden), "rope_freqs.weight": (32,)}
    if per_layer:
        outside["per_layer_token_embd.weight"] = (VOCABULARY, per_layer * LAYERS)
        outside["per_layer_model_proj.weight"] = (per_layer * LAYERS, hidden)
        outside["per_layer_proj_norm.weight"] = (per_layer,)
    keys = expert_keys(experts, moe_width) | {
        "attention.sliding_window": 32,
        "attention.sliding_window_pattern": [bid % 6 != 5 for bid in range(LAYERS)],
        "attention.key_length_swa": 64,
        "attention.value_length_swa": 64,
        "embedding_length_per_layer_input": per_layer,
    }
    return fake_model("gemma4", layers, outside, experts, 4, kv_heads, hidden, keys)


def qwen3(*, tied: bool, heads: int = 8, hidden: int = 256, width: int = 768) -> FakeModel:
    """Qwen 3, dense; 8 heads on 2 key/value heads unless told otherwise."""
    layer = attention(hidden, heads, 2) | dense_ffn(hidden, width)
    outside = embeddings(hidden, tied=tied)
    return fake_model("qwen3", [layer] * LAYERS, outside, 0, heads, hidden_size=hidden)


def qwen3_moe(*, experts: int, tied: bool, moe_width: int = 96) -> FakeModel:
    """Qwen 3 MoE: routed experts instead of the MLP."""
    layer = attention(256, 4, 2) | expert_ffn(256, moe_width, experts)
    keys = expert_keys(experts, moe_width)
    return fake_model("qwen3moe", [layer] * LAYERS, embeddings(256, tied=tied), experts, keys=keys)


def mixtral() -> FakeModel:
    """Llama with 8 experts."""
    layer = attention(256, 4, 2) | expert_ffn(256, 512, 8)
    outside = embeddings(256, tied=False)
    return fake_model("llama", [layer] * LAYERS, outside, 8, keys=expert_keys(8, 512))


def llama_70b(heads: int = 8) -> FakeModel:
    """80 layers of llama, which llama.cpp calls 70B where heads share keys: attn_v gets more."""
    layer = attention(256, heads, 2) | dense_ffn(256, 256)
    return fake_model("llama", [layer] * 80, embeddings(256, tied=False), 0, heads, (2,) * 80)


def deepseek2() -> FakeModel:
    """Latent attention with attn_kv_b, two dense layers, then routed and shared experts."""
    latent: Shapes = {
        "attn_norm.weight": (256,),
        "attn_q_a.weight": (256, 256),
        "attn_q_a_norm.weight": (256,),
        "attn_q_b.weight": (4 * 64, 256),
        "attn_kv_a_mqa.weight": (256 + 32, 256),
        "attn_kv_a_norm.weight": (256,),
        "attn_kv_b.weight": (4 * 64, 256),
        "attn_k_b.weight": (4, 256, 32),
        "attn_v_b.weight": (4, 32, 256),
        "attn_output.weight": (256, 4 * 64),
    }
    moe = expert_ffn(256, 96, 16) | dense_ffn(256, 192, "_shexp") | {"exp_probs_b.bias": (16,)}
    layers = [latent | (dense_ffn(256, 512) if bid < 2 else moe) for bid in range(LAYERS)]
    keys = expert_keys(16, 96) | {
        "attention.q_lora_rank": 256,
        "attention.kv_lora_rank": 256,
        "expert_shared_count": 2,
        "leading_dense_block_count": 2,
    }
    outside = embeddings(256, tied=False)
    return fake_model("deepseek2", layers, outside, 16, 4, (1,) * LAYERS, keys=keys)


def gpt_oss() -> FakeModel:
    """Biases on attention and experts, sinks, 32 experts, rows of 288 everywhere."""
    biases: Shapes = {f"attn_{kind}.bias": (512,) for kind in ("q", "k", "v", "output")}
    biases |= {f"ffn_{kind}_exps.bias": (32, 288) for kind in ("gate", "up", "down")}
    layer = attention(288, 8, 2) | biases | expert_ffn(288, 288, 32) | {"attn_sinks.weight": (8,)}
    keys = expert_keys(32, 288) | {"attention.sliding_window": 32}
    outside = embeddings(288, tied=False)
    return fake_model("gpt-oss", [layer] * LAYERS, outside, 32, 8, hidden_size=288, keys=keys)


def ernie4_5_moe() -> FakeModel:
    """A dense first layer, then 64 experts and shared ones."""
    moe = expert_ffn(256, 96, 64) | dense_ffn(256, 192, "_shexp") | {"exp_probs_b.bias": (64,)}
    layers = [
        attention(256, 4, 2) | (dense_ffn(256, 512) if bid < 1 else moe) for bid in range(LAYERS)
    ]
    keys = expert_keys(64, 96) | {"interleave_moe_layer_step": 1, "leading_dense_block_count": 1}
    outside = embeddings(256, tied=True)
    return fake_model("ernie4_5-moe", layers, outside, 64, 4, keys=keys)


def cohere2() -> FakeModel:
    """No second norm, tied."""
    layer = attention(256, 8, 2) | dense_ffn(256, 512)
    keys = {
        "attention.sliding_window": 32,
        "logit_scale": 0.25,
        "attention.layer_norm_epsilon": 1e-5,
    }
    return fake_model("cohere2", [layer] * LAYERS, embeddings(256, tied=True), 0, 8, keys=keys)


def gemma3() -> FakeModel:
    """Dense, tied, rows of 320 in ffn_down."""
    layer = attention(256, 4, 1) | dense_ffn(256, 320)
    keys = {"attention.sliding_window": 32}
    outside = embeddings(256, tied=True)
    return fake_model("gemma3", [layer] * LAYERS, outside, 0, 4, (1,) * LAYERS, keys=keys)


def embeddings(hidden: int, *, tied: bool) -> Shapes:
    """What stands outside the layers; without `output.weight` the embeddings are the output."""
    outside: Shapes = {"token_embd.weight": (VOCABULARY, hidden), "output_norm.weight": (hidden,)}
    return outside if tied else outside | {"output.weight": (VOCABULARY, hidden)}


def expert_keys(experts: int, width: int) -> dict[str, Any]:
    """GGUF keys of a model with routed experts; none for a dense one."""
    if not experts:
        return {}
    return {"expert_count": experts, "expert_used_count": 1, "expert_feed_forward_length": width}


KINDS: dict[str, FakeModel] = {
    "gemma4-dense": gemma4(),
    "gemma4-additive": gemma4(experts=16),
    "gemma4-additive-some-layers": gemma4(experts=16, moe_layers=range(3, 11)),
    "gemma4-moe-8": gemma4(experts=8, moe_width=256),
    "gemma4-ple": gemma4(per_layer=32),
    "gemma4-ple-moe-odd-rows": gemma4(experts=4, moe_width=40, per_layer=8, hidden=288, width=200),
    "qwen3-tied": qwen3(tied=True),
    "qwen3-untied": qwen3(tied=False),
    "qwen3-untied-gqa-2": qwen3(tied=False, heads=4),
    "qwen3-odd-rows": qwen3(tied=True, hidden=208, width=144),
    "qwen3moe-16": qwen3_moe(experts=16, tied=False),
    "qwen3moe-16-tied": qwen3_moe(experts=16, tied=True, moe_width=256),
    "qwen3moe-8": qwen3_moe(experts=8, tied=False),
    "qwen3moe-8-tied": qwen3_moe(experts=8, tied=True, moe_width=256),
    "mixtral": mixtral(),
    "llama-70b": llama_70b(),
    "deepseek2": deepseek2(),
    "llama-80-layers-mha": llama_70b(heads=2),
    "gpt-oss": gpt_oss(),
    "ernie4_5-moe": ernie4_5_moe(),
    "cohere2": cohere2(),
    "gemma3": gemma3(),
}


def write_gguf(path: Path, model: FakeModel, types: dict[str, str]) -> None:
    """A GGUF with the model's metadata, float tensors of these types, and a hole for data."""
    writer = gguf.GGUFWriter(path, model.architecture)
    for key, value in _keys(model):
        _add(writer, f"{model.architecture}.{key}", value)
    size = 0
    for tensor in reversed(model.tensors):  # an order that is not the loader's
        qtype = gguf.GGMLQuantizationType[types[tensor.name]]
        n_bytes = math.prod(tensor.shape) * (4 if qtype.name == "F32" else 2)
        writer.add_tensor_info(tensor.name, tensor.shape, None, n_bytes, raw_dtype=qtype)
        size += n_bytes + 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)


def _keys(model: FakeModel) -> Iterator[tuple[str, Any]]:
    yield "context_length", 128
    yield "embedding_length", model.hidden_size
    yield "block_count", model.block_count
    yield "feed_forward_length", 512
    yield "attention.head_count", model.head_count
    yield "attention.head_count_kv", list(model.head_count_kv)
    yield "attention.key_length", 64
    yield "attention.value_length", 64
    yield "rope.dimension_count", 64
    yield "attention.layer_norm_rms_epsilon", 1e-6
    yield from model.keys.items()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)
