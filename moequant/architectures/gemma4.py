"""Gemma 4: dense, MoE, additive MoE, and per-layer embeddings (PLE) with shared keys and values.

Owns: the family's row. Leaves out: the vision and audio towers, which are named as left out.

What differs from a plain transformer, by number:
1. Full-attention layers have a head size and a number of key/value heads of their own. Both stand
   in `per_layer_config`, which transformers fills from the older `global_*` keys.
2. With `attention_k_eq_v` a full-attention layer has no `v_proj`: its values are its keys.
3. The last `num_kv_shared_layers` layers use an earlier layer's keys and values. Some checkpoints
   still carry `k_proj`, `v_proj` and `k_norm` there; no implementation reads them, so they are left
   out (llama.cpp's converter writes them all the same).
4. With `use_double_wide_mlp` those layers' MLP is twice as wide.
5. Full-attention layers rotate only a part of each head: `rope_freqs` divides the other
   frequencies by 1e30. Getting the count wrong is not an error, it is fluent nonsense.
6. A layer has experts, beside its MLP, if and only if its `router.proj.weight` is there. All its
   other expert tensors are then required. llama.cpp decides by the same tensor.
7. Norm weights are stored as they are (unlike Gemma 3's, which need one added).
8. Beside experts, the MLP's output goes through `post_feedforward_layernorm_1` before the two are
   added and normed again. A norm takes out the scale of a whole vector, so that without experts of
   the first norm only its weights are left, and those can stand in the rows of `down_proj`.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from moequant.architectures.family import (
    Config,
    Family,
    Layout,
    Row,
    Scope,
    Tokenizer,
    WithoutExperts,
)
from moequant.architectures.file_keys import FileKeys, common_fields, expert_width
from moequant.architectures.keys import BOOL, COMMON, FLOAT32, UINT32, Key, field, rope
from moequant.errors import GGUFError

SLIDING, FULL = "sliding_attention", "full_attention"

PLE_TABLE, PLE_MAP = ("ple_vocab", "ple_all"), ("ple_all", "hidden")
FIRST = (
    Row("token_embd.weight", "embed_tokens.weight", ("vocab", "hidden")),
    Row("per_layer_token_embd.weight", "embed_tokens_per_layer.weight", PLE_TABLE, "ple"),
    Row("per_layer_model_proj.weight", "per_layer_model_projection.weight", PLE_MAP, "ple"),
    Row("per_layer_proj_norm.weight", "per_layer_projection_norm.weight", ("ple",), "ple"),
    Row("rope_freqs.weight", "", ("frequencies",)),
)
LAYER = (
    Row("attn_norm.weight", "input_layernorm.weight", ("hidden",)),
    Row("attn_q.weight", "self_attn.q_proj.weight", ("q", "hidden")),
    Row("attn_q_norm.weight", "self_attn.q_norm.weight", ("head",)),
    Row("attn_k.weight", "self_attn.k_proj.weight", ("kv", "hidden"), "own_kv"),
    Row("attn_k_norm.weight", "self_attn.k_norm.weight", ("head",), "own_kv"),
    Row("attn_v.weight", "self_attn.v_proj.weight", ("kv", "hidden"), "own_v"),
    Row("attn_output.weight", "self_attn.o_proj.weight", ("hidden", "q")),
    Row("post_attention_norm.weight", "post_attention_layernorm.weight", ("hidden",)),
    Row("ffn_norm.weight", "pre_feedforward_layernorm.weight", ("hidden",)),
    Row("ffn_gate.weight", "mlp.gate_proj.weight", ("ff", "hidden")),
    Row("ffn_up.weight", "mlp.up_proj.weight", ("ff", "hidden")),
    Row("ffn_down.weight", "mlp.down_proj.weight", ("hidden", "ff")),
    Row("post_ffw_norm_1.weight", "post_feedforward_layernorm_1.weight", ("hidden",), "moe"),
    Row("pre_ffw_norm_2.weight", "pre_feedforward_layernorm_2.weight", ("hidden",), "moe"),
    Row("ffn_gate_inp.weight", "router.proj.weight", ("experts", "hidden"), "moe"),
    Row("ffn_gate_inp.scale", "router.scale", ("hidden",), "moe"),
    Row(
        "ffn_gate_up_exps.weight",
        "experts.gate_up_proj",
        ("experts", "gate_up", "hidden"),
        "moe",
        halves=("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    ),
    Row("ffn_down_exps.weight", "experts.down_proj", ("experts", "hidden", "expert_ff"), "moe"),
    Row("ffn_down_exps.scale", "router.per_expert_scale", ("experts",), "moe"),
    Row("post_ffw_norm_2.weight", "post_feedforward_layernorm_2.weight", ("hidden",), "moe"),
    Row("post_ffw_norm.weight", "post_feedforward_layernorm.weight", ("hidden",)),
    Row("inp_gate.weight", "per_layer_input_gate.weight", ("ple", "hidden"), "ple"),
    Row("proj.weight", "per_layer_projection.weight", ("hidden", "ple"), "ple"),
    Row("post_norm.weight", "post_per_layer_input_norm.weight", ("hidden",), "ple"),
    Row("layer_output_scale.weight", "layer_scalar", ("one",)),
)
LAST = (
    Row("output_norm.weight", "norm.weight", ("hidden",)),
    Row("output.weight", "lm_head.weight", ("vocab", "hidden"), "untied", at_head=True),
)
EXPLAIN = {
    "moe": "its layer has no router.proj.weight, or enable_moe_block is off",
    "own_v": "with attention_k_eq_v a full-attention layer has no v_proj",
    "ple": "hidden_size_per_layer_input is 0",
}
WITHOUT_EXPERTS = WithoutExperts(
    feature="moe",
    config={
        "enable_moe_block": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
    },
    folds=(("mlp.down_proj.weight", "post_feedforward_layernorm_1.weight"),),
)


def _overrides(config: Config) -> Mapping[str, Any]:
    """What full-attention layers have of their own (1): head_dim, perhaps num_key_value_heads."""
    layers = {int(bid): values for bid, values in (config.get("per_layer_config") or {}).items()}
    full = [bid for bid, kind in enumerate(config["layer_types"]) if kind == FULL]
    chosen: Mapping[str, Any] = layers.get(full[0], {}) if full else {}
    return chosen


def _full_head_dim(config: Config) -> int:
    value: int = _overrides(config).get("head_dim", config["head_dim"])
    return value


def _is_sliding(config: Config) -> list[bool]:
    return [kind == SLIDING for kind in config["layer_types"]]


def _kv_heads(config: Config) -> list[int]:
    own = config["num_key_value_heads"]
    full = _overrides(config).get("num_key_value_heads", own)
    return [own if sliding else full for sliding in _is_sliding(config)]


def _kv_heads_value(config: Config) -> int | list[int]:
    if "num_key_value_heads" in _overrides(config):
        return _kv_heads(config)
    single: int = config["num_key_value_heads"]
    return single


def _first_shared(config: Config) -> int:
    """The first layer that uses an earlier layer's keys and values (3)."""
    first: int = config["num_hidden_layers"] - (config["num_kv_shared_layers"] or 0)
    return first


def _ff(config: Config, bid: int) -> int:
    width: int = config["intermediate_size"]
    return 2 * width if config["use_double_wide_mlp"] and bid >= _first_shared(config) else width


def _ff_value(config: Config) -> int | list[int]:
    if config["use_double_wide_mlp"]:
        return [_ff(config, bid) for bid in range(config["num_hidden_layers"])]
    return _ff(config, 0)


def _ple(config: Config) -> int:
    """Width of the per-layer embeddings; 0 without them. llama.cpp wants the key either way."""
    return config["hidden_size_per_layer_input"] or 0


KEYS = (
    *COMMON,
    Key("feed_forward_length", UINT32, _ff_value),
    Key("attention.head_count_kv", UINT32, _kv_heads_value),
    Key("attention.key_length", UINT32, _full_head_dim),
    Key("attention.value_length", UINT32, _full_head_dim),
    Key("attention.key_length_swa", UINT32, field("head_dim")),
    Key("attention.value_length_swa", UINT32, field("head_dim")),
    Key("attention.sliding_window", UINT32, field("sliding_window")),
    Key("attention.sliding_window_pattern", BOOL, _is_sliding),
    Key("attention.shared_kv_layers", UINT32, field("num_kv_shared_layers")),
    Key("embedding_length_per_layer_input", UINT32, _ple),
    Key("final_logit_softcapping", FLOAT32, lambda c: c["final_logit_softcapping"] or None),
    Key("rope.freq_base_swa", FLOAT32, lambda c: rope(c, SLIDING).get("rope_theta")),
    Key("rope.dimension_count", UINT32, _full_head_dim),
    Key("rope.dimension_count_swa", UINT32, field("head_dim")),
)


def _config_of(keys: FileKeys) -> dict[str, Any]:
    """The text configuration: the inverse of `KEYS`, and what only the tensors tell."""
    fields = common_fields(keys)
    layers = fields["num_hidden_layers"]
    sliding = keys.flags("attention.sliding_window_pattern", layers)
    shared = keys.count("attention.shared_kv_layers", 0)
    if shared >= layers:
        raise GGUFError(f"{keys.origin}: {shared} shared_kv_layers, of {layers} layers.")
    own_keys = [bid for bid in range(layers - shared) if not sliding[bid]]
    ple_table = keys.shapes.get("per_layer_token_embd.weight", (fields["vocab_size"],))
    return {
        **fields,
        **_widths_of(keys, sliding, shared),
        **_experts_of(keys),
        "model_type": "gemma4_text",
        "layer_types": [SLIDING if flag else FULL for flag in sliding],
        "sliding_window": keys.count("attention.sliding_window"),
        "num_kv_shared_layers": shared,
        "attention_k_eq_v": any(f"blk.{b}.attn_v.weight" not in keys.shapes for b in own_keys),
        "hidden_size_per_layer_input": keys.count("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": ple_table[0],
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
        "rope_parameters": {
            FULL: {
                "rope_type": "proportional",
                "rope_theta": keys.number("rope.freq_base", 10000.0),
                "partial_rotary_factor": _rotated_part(keys),
            },
            SLIDING: {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa")},
        },
    }


def _widths_of(keys: FileKeys, sliding: list[bool], shared: int) -> dict[str, Any]:
    """Sizes of heads and MLPs, of which some layers have their own (1, 4)."""
    kv_heads = keys.counts("attention.head_count_kv", len(sliding))
    widths = keys.counts("feed_forward_length", len(sliding))
    ordinary = next((n for n, flag in zip(kv_heads, sliding, strict=True) if flag), kv_heads[0])
    full = next((n for n, flag in zip(kv_heads, sliding, strict=True) if not flag), ordinary)
    expected = [ordinary if flag else full for flag in sliding]
    if kv_heads != expected:
        raise GGUFError(f"{keys.origin}: attention.head_count_kv differs within a kind of layer.")
    own: dict[str, Any] = {"head_dim": keys.count("attention.key_length")}
    if full != ordinary:
        own["num_key_value_heads"] = full
    double = [widths[0]] * (len(widths) - shared) + [2 * widths[0]] * shared
    if widths not in (double, [widths[0]] * len(widths)):
        raise GGUFError(
            f"{keys.origin}: feed_forward_length is {widths}; one width is supported, twice that "
            "in the layers that share keys and values."
        )
    return {
        "num_key_value_heads": ordinary,
        "head_dim": keys.count("attention.key_length_swa"),
        "per_layer_config": {bid: dict(own) for bid, flag in enumerate(sliding) if not flag},
        "intermediate_size": widths[0],
        "use_double_wide_mlp": shared > 0 and widths == double,
    }


def _experts_of(keys: FileKeys) -> dict[str, Any]:
    """The experts' fields; without a router in any layer the model is dense (6)."""
    if not any(name.endswith(".ffn_gate_inp.weight") for name in keys.shapes):
        return {"enable_moe_block": False}
    return {
        "enable_moe_block": True,
        "num_experts": keys.count("expert_count"),
        "top_k_experts": keys.count("expert_used_count"),
        "moe_intermediate_size": expert_width(keys),
    }


def _rotated_part(keys: FileKeys) -> float:
    """`partial_rotary_factor` from the ones of `rope_freqs` (5)."""
    head = keys.count("attention.key_length")
    found = keys.shapes.get("rope_freqs.weight")
    if found != (head // 2,) or not head:
        has = "missing" if found is None else f"of shape {list(found)}"
        raise GGUFError(
            f"{keys.origin}: rope_freqs.weight is {has}; with attention.key_length {head} it has "
            f"{head // 2} values."
        )
    divisors = keys.values("rope_freqs.weight")
    rotated = int((divisors == 1).sum())
    if (divisors[:rotated] != 1).any() or not (divisors[rotated:] > 1e29).all() or not rotated:
        raise GGUFError(
            f"{keys.origin}: rope_freqs.weight has other values than ones and then 1e30; only "
            "Gemma 4's partial rotation is supported."
        )
    part = 2 * rotated / head
    return part if int(head * part / 2) == rotated else math.nextafter(part, 2.0)


def _refuse(config: Config) -> list[str]:
    """What llama.cpp's gemma4 graph has fixed, and this configuration has otherwise."""
    wrong = []
    for name, value in (
        ("attention_bias", False),
        ("hidden_activation", "gelu_pytorch_tanh"),
    ):
        if config[name] != value:
            wrong.append(f"{name} is {config[name]!r}; only {value!r} is supported")
    if config["use_bidirectional_attention"] == "all":
        wrong.append("use_bidirectional_attention is 'all'; only causal text models are supported")
    return wrong + _refuse_rope(config) + _refuse_layers(config)


def _refuse_rope(config: Config) -> list[str]:
    wrong = []
    for layer_type, expected in ((FULL, "proportional"), (SLIDING, "default")):
        kind = rope(config, layer_type).get("rope_type")
        if kind != expected:
            wrong.append(f"rope_type of {layer_type} is {kind!r}; only {expected!r} is supported")
    part = rope(config).get("partial_rotary_factor")
    if not isinstance(part, int | float) or not 0 < part <= 1:
        wrong.append(f"partial_rotary_factor of {FULL} is {part!r}; it must be in (0, 1]")
    if rope(config, SLIDING).get("partial_rotary_factor", 1.0) != 1.0:
        wrong.append(f"partial_rotary_factor of {SLIDING} is not 1")
    return wrong


def _refuse_layers(config: Config) -> list[str]:
    kinds = config["layer_types"]
    wrong = [f"layer_types has {k!r}" for k in sorted(set(kinds) - {SLIDING, FULL})]
    first = _first_shared(config)
    if not 0 < first <= len(kinds) or set(kinds[:first]) != set(kinds):
        shared = config["num_kv_shared_layers"]
        wrong.append(
            f"num_kv_shared_layers is {shared}: no earlier layer of the kind to share with"
        )
    full, layers = _overrides(config), config.get("per_layer_config") or {}
    own = {int(bid): dict(values) for bid, values in layers.items()}
    for bid, kind in enumerate(kinds):
        found, expected = own.get(bid, {}), dict(full) if kind == FULL else {}
        if found != expected or set(found) - {"head_dim", "num_key_value_heads"}:
            wrong.append(f"per_layer_config of layer {bid} is {found}; {expected} is supported")
    return wrong


def _rope_freqs(config: Config) -> tuple[float, ...]:
    """Frequency divisors of full-attention layers (5): 1 where rotated, 1e30 where not."""
    head = _full_head_dim(config)
    rotated = int(head * rope(config)["partial_rotary_factor"] / 2)
    return (1.0,) * rotated + (1e30,) * (head // 2 - rotated)


def _layer(config: Config, names: Collection[str], bid: int, kv_heads: int) -> Scope:
    sliding = config["layer_types"][bid] == SLIDING
    head = config["head_dim"] if sliding else _full_head_dim(config)
    shared = bid >= _first_shared(config)
    holds = {
        "moe": bool(config["enable_moe_block"]) and f"layers.{bid}.router.proj.weight" in names,
        "own_kv": not shared,
        "own_v": not shared and (sliding or not config["attention_k_eq_v"]),
        "ple": _ple(config) > 0,
    }
    return Scope(
        sizes={
            "one": 1,
            "hidden": config["hidden_size"],
            "head": head,
            "q": config["num_attention_heads"] * head,
            "kv": kv_heads * head,
            "ff": _ff(config, bid),
            "ple": _ple(config),
            "experts": config["num_experts"] or 0,
            "expert_ff": config["moe_intermediate_size"] or 0,
            "gate_up": 2 * (config["moe_intermediate_size"] or 0),
        },
        features=frozenset(feature for feature, held in holds.items() if held),
        unused=frozenset({"own_kv", "own_v"}) if shared else frozenset(),
    )


def _layout(config: Config, names: Collection[str]) -> Layout:
    ple = _ple(config)
    untied = "lm_head.weight" in names or not config["tie_word_embeddings"]
    features = {"ple": ple > 0, "untied": untied}
    kv_heads = _kv_heads(config)
    return Layout(
        outside=Scope(
            sizes={
                "vocab": config["vocab_size"],
                "hidden": config["hidden_size"],
                "ple": ple,
                "ple_vocab": config["vocab_size_per_layer_input"],
                "ple_all": config["num_hidden_layers"] * ple,
                "frequencies": _full_head_dim(config) // 2,
            },
            features=frozenset(feature for feature, held in features.items() if held),
            constants={"rope_freqs.weight": _rope_freqs(config)},
        ),
        layers=tuple(_layer(config, names, bid, heads) for bid, heads in enumerate(kv_heads)),
        head_count_kv=tuple(kv_heads),
        expert_count=config["num_experts"] or 0 if config["enable_moe_block"] else 0,
        expert_used_count=config["top_k_experts"] or 0 if config["enable_moe_block"] else 0,
    )


GEMMA4 = Family(
    architecture="gemma4",
    model_types=("gemma4", "gemma4_text"),
    first=FIRST,
    layer=LAYER,
    last=LAST,
    keys=KEYS,
    tokenizer=Tokenizer(
        kind="bpe_with_byte_fallback",
        model="gemma4",
        has_scores=True,
        # Control tokens that a chat parser has to see, so they are always rendered.
        user_defined=frozenset(
            {
                "<|channel>",
                "<channel|>",
                "<|tool_call>",
                "<tool_call|>",
                "<|tool_response>",
                "<tool_response|>",
                '<|"|>',
            }
        ),
        forced={"add_space_prefix": False, "add_bos_token": True},
    ),
    refuse=_refuse,
    layout=_layout,
    config_of=_config_of,
    left_out=("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio."),
    explain=EXPLAIN,
    without_experts=WITHOUT_EXPERTS,
)
