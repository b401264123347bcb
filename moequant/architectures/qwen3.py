"""Qwen3, dense, and Qwen3-MoE, whose layers have experts in place of an MLP.

Owns: the two families' rows. Leaves out: rerankers, embedding models and the vision variants.

What differs from a plain transformer, by number:
1. Queries and keys are normed per head before they are rotated.
2. Qwen3-MoE's checkpoints hold each expert's `gate_proj`, `up_proj` and `down_proj` by itself;
   GGUF holds one stack of each, gate and up apart.
3. llama.cpp's graph has experts in every layer of Qwen3-MoE and always lets a token's gate weights
   sum to one (`norm_topk_prob`). Other configurations are refused: they would run, and be wrong.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from moequant.architectures.family import Config, Family, Layout, Row, Scope, Tokenizer
from moequant.architectures.file_keys import (
    FileKeys,
    common_fields,
    expert_width,
    rope_parameters,
)
from moequant.architectures.keys import COMMON, SCALED_ROPE, UINT32, Key, field, rope
from moequant.architectures.ops import STACK

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

FIRST = (Row("token_embd.weight", "embed_tokens.weight", ("vocab", "hidden")),)
ATTENTION = (
    Row("attn_norm.weight", "input_layernorm.weight", ("hidden",)),
    Row("attn_q.weight", "self_attn.q_proj.weight", ("q", "hidden")),
    Row("attn_q_norm.weight", "self_attn.q_norm.weight", ("head",)),
    Row("attn_k.weight", "self_attn.k_proj.weight", ("kv", "hidden")),
    Row("attn_k_norm.weight", "self_attn.k_norm.weight", ("head",)),
    Row("attn_v.weight", "self_attn.v_proj.weight", ("kv", "hidden")),
    Row("attn_output.weight", "self_attn.o_proj.weight", ("hidden", "q")),
    Row("ffn_norm.weight", "post_attention_layernorm.weight", ("hidden",)),
)
MLP = (
    Row("ffn_gate.weight", "mlp.gate_proj.weight", ("ff", "hidden")),
    Row("ffn_up.weight", "mlp.up_proj.weight", ("ff", "hidden")),
    Row("ffn_down.weight", "mlp.down_proj.weight", ("hidden", "ff")),
)
UP, DOWN = ("experts", "expert_ff", "hidden"), ("experts", "hidden", "expert_ff")
EXPERTS = (
    Row("ffn_gate_inp.weight", "mlp.gate.weight", ("experts", "hidden")),
    Row("ffn_gate_exps.weight", "mlp.experts.{e}.gate_proj.weight", UP, op=STACK),
    Row("ffn_up_exps.weight", "mlp.experts.{e}.up_proj.weight", UP, op=STACK),
    Row("ffn_down_exps.weight", "mlp.experts.{e}.down_proj.weight", DOWN, op=STACK),
)
LAST = (
    Row("output_norm.weight", "norm.weight", ("hidden",)),
    Row("output.weight", "lm_head.weight", ("vocab", "hidden"), "untied", at_head=True),
)
KEYS = (
    *COMMON,
    *SCALED_ROPE,
    Key("feed_forward_length", UINT32, field("intermediate_size")),
    Key("attention.head_count_kv", UINT32, field("num_key_value_heads")),
    Key("attention.key_length", UINT32, field("head_dim")),
    Key("attention.value_length", UINT32, field("head_dim")),
)


def _config_of(keys: FileKeys) -> dict[str, Any]:
    """The dense model's configuration: the inverse of `KEYS`."""
    fields = common_fields(keys)
    head = fields["hidden_size"] // max(fields["num_attention_heads"], 1)
    return fields | {
        "model_type": "qwen3",
        "intermediate_size": keys.count("feed_forward_length"),
        "num_key_value_heads": keys.count("attention.head_count_kv", fields["num_attention_heads"]),
        "head_dim": keys.count("attention.key_length", head),
        "rope_parameters": rope_parameters(keys),
    }


def _moe_config_of(keys: FileKeys) -> dict[str, Any]:
    """The same with experts; what llama.cpp's graph has fixed is as it has it (3)."""
    return _config_of(keys) | {
        "model_type": "qwen3_moe",
        "num_experts": keys.count("expert_count"),
        "num_experts_per_tok": keys.count("expert_used_count"),
        "moe_intermediate_size": expert_width(keys),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _refuse(config: Config) -> list[str]:
    """What llama.cpp's qwen3 and qwen3moe graphs have fixed, and this configuration otherwise."""
    fixed: list[tuple[str, Any]] = [
        ("attention_bias", False),
        ("hidden_act", "silu"),
        ("use_sliding_window", False),
    ]
    if config["model_type"] == "qwen3_moe":
        fixed += [("norm_topk_prob", True), ("decoder_sparse_step", 1), ("mlp_only_layers", [])]
    wrong = [
        f"{name} is {config[name]!r}; only {value!r} is supported"
        for name, value in fixed
        if config[name] != value
    ]
    kind = rope(config).get("rope_type")
    if kind not in ("default", "linear", "yarn"):
        wrong.append(f"rope_type is {kind!r}; default, linear and yarn are supported")
    return wrong


def _layout(config: Config, names: Collection[str]) -> Layout:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    experts = config.get("num_local_experts", 0)
    untied = "lm_head.weight" in names or not config["tie_word_embeddings"]
    layer = Scope(
        sizes={
            "hidden": config["hidden_size"],
            "head": head,
            "q": heads * head,
            "kv": kv_heads * head,
            "ff": config["intermediate_size"],
            "experts": experts,
            "expert_ff": config.get("moe_intermediate_size", 0),
        }
    )
    return Layout(
        outside=Scope(
            sizes={"vocab": config["vocab_size"], "hidden": config["hidden_size"]},
            features=frozenset({"untied"} if untied else ()),
        ),
        layers=(layer,) * config["num_hidden_layers"],
        head_count_kv=(kv_heads,) * config["num_hidden_layers"],
        expert_count=experts,
        expert_used_count=config.get("num_experts_per_tok", 0),
    )


QWEN3 = Family(
    architecture="qwen3",
    model_types=("qwen3",),
    first=FIRST,
    layer=ATTENTION + MLP,
    last=LAST,
    keys=KEYS,
    tokenizer=Tokenizer(kind="byte_level_bpe", model="gpt2", pre="qwen2", pattern=QWEN2_PATTERN),
    refuse=_refuse,
    layout=_layout,
    config_of=_config_of,
)
QWEN3_MOE = replace(
    QWEN3,
    architecture="qwen3moe",
    model_types=("qwen3_moe",),
    layer=ATTENTION + EXPERTS,
    config_of=_moe_config_of,
)
