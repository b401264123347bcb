"""Which type llama-quantize gives each tensor of a model under a named preset.

Owns: the groups tensors fall into, what is never quantized, the order that counters follow, the
output tensor, the fallback of rows that do not fit. Leaves out: the presets' own exceptions
(`moequant.plan.presets`), and every preset and architecture that moequant does not export.

Source: src/llama-quant.cpp of the pinned llama.cpp. In the order of its functions:
1. `tensor_allows_quantization` → `may_be_quantized`
2. `tensor_get_category` → `_group`; `weight_name_comparer` (the loader's order) → `_loader_order`
3. `llama_tensor_get_type_impl` → `_wanted`, with the presets' rules
4. `tensor_type_fallback` → `fallback_type`

Two differences in form, none in result. There, an output tensor whose rows do not fit the default
type is made Q8_0 before fallbacks are looked at, and is not counted as one; here it wants Q6_K
and falls back to the same Q8_0, and is reported. And there, counters are advanced while types are
chosen; here a tensor's index is a function of the model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moequant.errors import PlanError
from moequant.plan import sizes
from moequant.plan.model import Model, Tensor, block_of
from moequant.plan.presets import Preset, Rule, Site

# First match wins. `attn_q`, `ffn_up` and `ffn_gate` have no rule in these presets.
_GROUP_BY_NAME = {
    "output.weight": "output",
    "token_embd.weight": "token_embd",
    "per_layer_token_embd.weight": "token_embd",
}
_GROUP_BY_PART = (
    ("attn_qkv.weight", "attn_v"),
    ("attn_kv_b.weight", "attn_v"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "other"),
    ("ffn_gate", "other"),
    ("ffn_down", "ffn_down"),
)

# Not quantized, whatever the preset. Parts that only occur in architectures outside moequant's
# reach (RWKV, T5, audio, vision) are left out.
_KEPT_PARTS = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel",
    "per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight",
    "indexer.q_proj.weight", ".position_embd",
)  # fmt: skip
_KEPT_NAMES = ("position_embd.weight", "token_types.weight")

# Rows that are not whole blocks of 256 take a type with blocks of 32; if those do not fit
# either, or the type has blocks of 32 already, F16.
_FALLBACK = {
    "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


@dataclass(frozen=True)
class Choice:
    """The type a preset wants for a tensor, and the type its rows allow."""

    wanted: str
    qtype: str


def choose_types(
    preset: Preset, model: Model, base_types: Mapping[str, str], *, has_imatrix: bool
) -> dict[str, Choice]:
    """Type of every tensor of the model, by name, as llama-quantize would have it.

    `base_types`: the type each tensor has in the file that llama-quantize would read; what is not
    quantized keeps it. `has_imatrix`: whether importance data is given, which some presets ask.
    PlanError if an ffn_down of a model with experts is not in one of its layers.
    """
    groups = _groups(model)
    sites = _sites(model, groups, has_imatrix)
    choices = {}
    for tensor in model.tensors:
        wanted = base_types[tensor.name]
        if not preset.is_float and may_be_quantized(tensor):
            wanted = _wanted(preset, tensor, groups[tensor.name], sites[tensor.name])
        choices[tensor.name] = Choice(wanted, fallback_type(wanted, tensor.shape[-1]))
    return choices


def may_be_quantized(tensor: Tensor) -> bool:
    """Whether llama-quantize touches a tensor at all: a matrix or a stack of them, by name."""
    return (
        _dimensions(tensor.shape) >= 2
        and tensor.name.endswith("weight")
        and tensor.name not in _KEPT_NAMES
        and not any(part in tensor.name for part in _KEPT_PARTS)
    )


def fallback_type(wanted: str, cols: int) -> str:
    """The type that rows of `cols` values get where a preset wants `wanted`."""
    if sizes.fits(wanted, cols):
        return wanted
    smaller = _FALLBACK.get(wanted, wanted)
    return smaller if sizes.fits(smaller, cols) else "F16"


def _dimensions(shape: tuple[int, ...]) -> int:
    """As ggml counts them: a matrix of one row is 1-D (`ggml_n_dims`)."""
    leading_ones = next((i for i, n in enumerate(shape) if n != 1), len(shape) - 1)
    return len(shape) - leading_ones


def _groups(model: Model) -> dict[str, str]:
    """Group of every tensor; without an output tensor the embeddings are the output too."""
    groups = {tensor.name: _group(tensor.name) for tensor in model.tensors}
    if "output" in groups.values():
        return groups
    return {name: "output" if group == "token_embd" else group for name, group in groups.items()}


def _group(name: str) -> str:
    if name in _GROUP_BY_NAME:
        return _GROUP_BY_NAME[name]
    return next((group for part, group in _GROUP_BY_PART if part in name), "other")


def _sites(model: Model, groups: Mapping[str, str], has_imatrix: bool) -> dict[str, Site]:
    """Where each tensor stands among its kind.

    attn_v: its rank among those that exist, so that layers without one do not count. ffn_down:
    its layer if the model has experts, else its rank; among all layers in both cases.
    """
    experts = model.expert_count
    facts = (_gqa(model), experts, _called_70b(model), has_imatrix)
    counts = dict.fromkeys(groups.values(), model.block_count)
    counts["attn_v"] = sum(group == "attn_v" for group in groups.values())
    ranks = dict.fromkeys(counts, 0)
    sites = {}
    for tensor in sorted(model.tensors, key=_loader_order):
        group = groups[tensor.name]
        rank = ranks[group]
        ranks[group] += may_be_quantized(tensor)
        index = _layer(tensor.name, model) if experts > 1 and group == "ffn_down" else rank
        sites[tensor.name] = Site(index, counts[group], *facts)
    return sites


def _loader_order(tensor: Tensor) -> tuple[int, str]:
    """llama-quantize visits tensors in this order, whatever their order in the file."""
    block = block_of(tensor.name)
    return (-1 if block is None else block, tensor.name)


def _layer(name: str, model: Model) -> int:
    block = block_of(name)
    if block is None or block >= model.block_count:
        raise PlanError(f"{name} is not in one of the {model.block_count} layers of the model.")
    return block


def _gqa(model: Model) -> int:
    """Heads per key/value head, of the first layer (`n_gqa`)."""
    kv_heads = next(iter(model.head_count_kv), 0)
    return model.head_count // kv_heads if kv_heads else 0


def _wanted(preset: Preset, tensor: Tensor, group: str, site: Site) -> str:
    """The type before rows are looked at."""
    if group == "output":
        return "Q8_0" if preset.default in ("Q8_0", "MXFP4") else "Q6_K"
    if preset.default == "MXFP4":
        stacked = len(tensor.shape) >= 3 and tensor.shape[-3] > 1
        return "MXFP4" if stacked else "Q8_0"
    if group in ("attn_v", "attn_k") and site.expert_count == 8:
        return "Q8_0"
    wanted = _first_match(_rules(preset, group), site, preset.default)
    if group == "attn_v" and site.called_70b and wanted in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return wanted


def _rules(preset: Preset, group: str) -> tuple[Rule, ...]:
    by_group = {
        "attn_v": preset.attn_v,
        "attn_output": preset.attn_output,
        "ffn_down": preset.ffn_down,
    }
    return by_group.get(group, ())


def _first_match(rules: Iterable[Rule], site: Site, default: str) -> str:
    return next((rule.qtype for rule in rules if rule.holds(site)), default)


def _called_70b(model: Model) -> bool:
    """What llama.cpp calls 70B (`load_arch_hparams`), where attn_v is a small part of attention."""
    if model.architecture == "llama" and model.expert_count != 8:
        return model.block_count == 80 and model.head_count != next(iter(model.head_count_kv), 0)
    return model.architecture == "qwen2" and model.block_count == 80
