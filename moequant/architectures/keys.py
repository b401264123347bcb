"""GGUF's `{arch}.*` keys: name, value type, and where in the configuration the value stands.

Owns: `Key`, and the keys that every family has. Leaves out: what is special to one family (its
file), `general.*` and `tokenizer.*` (`gguf_export`). Source: `set_gguf_parameters` of llama.cpp's
`conversion/base.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGUFValueType

Value = Callable[[Mapping[str, Any]], Any]

UINT32 = GGUFValueType.UINT32
FLOAT32 = GGUFValueType.FLOAT32
BOOL = GGUFValueType.BOOL
STRING = GGUFValueType.STRING


@dataclass(frozen=True)
class Key:
    """One key, without the `{arch}.` before it.

    `value` gets the configuration; None means that the key is not written, a list that it is an
    array. `type` is that of a single value (gguf writes arrays of integers as INT32).
    """

    name: str
    type: GGUFValueType
    value: Value


def field(*names: str) -> Value:
    """The first of the configuration's fields `names` that is there, or None."""
    return lambda config: next((config[name] for name in names if name in config), None)


def rope(config: Mapping[str, Any], layer_type: str = "full_attention") -> Mapping[str, Any]:
    """The rotary parameters of a layer type, or the model's where it has only one kind."""
    parameters = config.get("rope_parameters") or {}
    chosen: Mapping[str, Any] = parameters.get(layer_type, parameters)
    return chosen


def _scaling(*names: str, kinds: tuple[str, ...] = ("yarn",)) -> Value:
    def value(config: Mapping[str, Any]) -> Any:
        parameters = rope(config)
        if parameters.get("rope_type") not in kinds or parameters.get("factor") is None:
            return None
        return next((parameters[name] for name in names if parameters.get(name) is not None), None)

    return value


COMMON: tuple[Key, ...] = (
    Key("block_count", UINT32, field("num_hidden_layers")),
    Key("context_length", UINT32, field("max_position_embeddings")),
    Key("embedding_length", UINT32, field("hidden_size")),
    Key("attention.head_count", UINT32, field("num_attention_heads")),
    Key("rope.freq_base", FLOAT32, lambda config: rope(config).get("rope_theta")),
    Key("attention.layer_norm_rms_epsilon", FLOAT32, field("rms_norm_eps")),
    Key("expert_count", UINT32, field("num_local_experts", "num_experts")),
    Key("expert_used_count", UINT32, field("num_experts_per_tok", "top_k_experts")),
    Key("expert_feed_forward_length", UINT32, field("moe_intermediate_size")),
)

SCALED_ROPE: tuple[Key, ...] = (
    Key("rope.scaling.type", STRING, _scaling("rope_type", kinds=("yarn", "linear"))),
    Key("rope.scaling.factor", FLOAT32, _scaling("factor", kinds=("yarn", "linear"))),
    Key(
        "rope.scaling.original_context_length",
        UINT32,
        _scaling("original_max_position_embeddings"),
    ),
    Key("rope.scaling.yarn_ext_factor", FLOAT32, _scaling("extrapolation_factor")),
    Key("rope.scaling.yarn_attn_factor", FLOAT32, _scaling("attention_factor", "attn_factor")),
    Key("rope.scaling.yarn_beta_fast", FLOAT32, _scaling("beta_fast")),
    Key("rope.scaling.yarn_beta_slow", FLOAT32, _scaling("beta_slow")),
)
