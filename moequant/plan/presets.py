"""The named presets, as llama-quantize means them: one table of data.

Owns: for each preset its file type number, its default type, and the exceptions to the default.
Leaves out: which tensor falls into which group, the output tensor, rows that do not fit
(`moequant.plan.rules`), and presets of our own, which do not take llama.cpp's names.

Source: `llama_tensor_get_type_impl` and `llama_ftype_get_default_type` in src/llama-quant.cpp of
the pinned llama.cpp, `enum llama_ftype` in include/llama.h. An exception is a list of rules; the
first whose condition holds gives the type, and where none holds the default stays.
Not in the table, because no preset here can reach it: the branch of llama_tensor_get_type_impl
for `attn_qkv` (an earlier branch takes every `attn_qkv` as `attn_v`).
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """Where a tensor stands: what the conditions of the presets look at.

    `index` counts from 0: the layer, or, for `attn_v`, the how-manieth of its kind it is among
    `count`. `gqa` is heads per key/value head in the first layer. `called_70b`: llama.cpp takes
    the model for a Llama 70B.
    """

    index: int
    count: int
    gqa: int
    expert_count: int
    called_70b: bool
    has_imatrix: bool


Condition = Callable[[Site], bool]


@dataclass(frozen=True)
class Rule:
    """`qtype` where `when` holds; None: everywhere."""

    qtype: str
    when: Condition | None = None

    def holds(self, site: Site) -> bool:
        """Whether the rule decides at this site."""
        return self.when is None or self.when(site)


def more_bits(site: Site) -> bool:
    """The first eighth, the last eighth, and every third between (`use_more_bits`)."""
    eighth = site.count // 8
    return (
        site.index < eighth or site.index >= 7 * site.count // 8 or (site.index - eighth) % 3 == 2
    )


def first_eighth(site: Site) -> bool:
    """Index below count // 8."""
    return site.index < site.count // 8


def first_sixteenth(site: Site) -> bool:
    """Index below count // 16."""
    return site.index < site.count // 16


def first_two(site: Site) -> bool:
    """The first two of their kind."""
    return site.index < 2


def first_four(site: Site) -> bool:
    """The first four of their kind."""
    return site.index < 4


def grouped_by_4(site: Site) -> bool:
    """Four query heads or more share a key/value head."""
    return site.gqa >= 4


def first_eighth_with_imatrix(site: Site) -> bool:
    """Index below count // 8, where importance data is given."""
    return site.has_imatrix and first_eighth(site)


def first_eighth_without_imatrix(site: Site) -> bool:
    """Index below count // 8, where no importance data is given."""
    return not site.has_imatrix and first_eighth(site)


def eight_experts(site: Site) -> bool:
    """Exactly 8 experts (tuned on Mixtral-8x7B, applied to whatever has 8)."""
    return site.expert_count == 8


def not_eight_experts(site: Site) -> bool:
    """Any number of experts but 8, none included."""
    return site.expert_count != 8


@dataclass(frozen=True)
class Preset:
    """A named preset. `file_type` is `general.file_type`; rules hold where the default does not."""

    name: str
    file_type: int
    default: str
    description: str
    attn_v: tuple[Rule, ...] = ()
    attn_output: tuple[Rule, ...] = ()
    ffn_down: tuple[Rule, ...] = ()

    @property
    def is_float(self) -> bool:
        """Whether every tensor keeps a float type: nothing is quantized."""
        return self.default in FLOAT_TYPES


FLOAT_TYPES = ("F32", "F16", "BF16")
_OUTPUT_8_EXPERTS = Rule("Q5_K", eight_experts)
_IQ4_V = (Rule("Q5_K", grouped_by_4),)
_IQ4_DOWN = (Rule("Q5_K", first_eighth_without_imatrix),)
_MORE_BITS = (Rule("Q6_K", more_bits),)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("F32", 0, "F32", "32-bit floats"),
        Preset("F16", 1, "F16", "16-bit floats; values above 65504 overflow"),
        Preset("BF16", 32, "BF16", "bfloat16, exact for a bfloat16 checkpoint"),
        Preset("Q8_0", 7, "Q8_0", "8.5 bits"),
        Preset("Q6_K", 18, "Q6_K", "6.6 bits"),
        Preset(
            "Q5_K_M", 17, "Q5_K", "5.5 bits, 6.6 for half of ffn_down and attn_v",
            attn_v=_MORE_BITS, ffn_down=_MORE_BITS,
        ),
        Preset("Q5_K_S", 16, "Q5_K", "5.5 bits"),
        Preset(
            "Q5_0", 8, "Q5_0", "5.5 bits, legacy, rows of 32 fit",
            ffn_down=(Rule("Q5_1", first_eighth_with_imatrix),),
        ),
        Preset(
            "Q4_K_M", 15, "Q4_K", "4.5 bits, 6.6 for half of ffn_down and attn_v: the usual choice",
            attn_v=_MORE_BITS, ffn_down=_MORE_BITS, attn_output=(_OUTPUT_8_EXPERTS,),
        ),
        Preset(
            "Q4_K_S", 14, "Q4_K", "4.5 bits, 5.5 for the first layers' ffn_down and attn_v",
            attn_v=(Rule("Q5_K", first_four),), ffn_down=(Rule("Q5_K", first_eighth),),
            attn_output=(_OUTPUT_8_EXPERTS,),
        ),
        Preset(
            "Q4_0", 2, "Q4_0", "4.5 bits, legacy, rows of 32 fit",
            ffn_down=(Rule("Q4_1", first_eighth_with_imatrix),),
        ),
        Preset(
            "Q3_K_L", 13, "Q3_K", "3.4 bits, 5.5 for ffn_down, attn_v and attn_output",
            attn_v=(Rule("Q5_K"),), ffn_down=(Rule("Q5_K"),),
            attn_output=(Rule("Q5_K", not_eight_experts),),
        ),
        Preset(
            "Q3_K_M", 12, "Q3_K", "3.4 bits, 4.5 or more for ffn_down, attn_v and attn_output",
            attn_v=(Rule("Q5_K", first_two), Rule("Q4_K")),
            ffn_down=(Rule("Q5_K", first_sixteenth), Rule("Q4_K")),
            attn_output=(_OUTPUT_8_EXPERTS, Rule("Q4_K")),
        ),
        Preset("Q3_K_S", 11, "Q3_K", "3.4 bits", attn_output=(_OUTPUT_8_EXPERTS,)),
        Preset(
            "Q2_K", 10, "Q2_K", "2.6 bits, 3.4 or more for ffn_down, attn_v and attn_output",
            attn_v=(Rule("Q4_K", grouped_by_4), Rule("Q3_K")),
            ffn_down=(Rule("Q3_K"),),
            attn_output=(_OUTPUT_8_EXPERTS, Rule("Q3_K")),
        ),
        Preset(
            "IQ4_XS", 30, "IQ4_XS", "4.25 bits, non-linear levels",
            attn_v=_IQ4_V, ffn_down=_IQ4_DOWN, attn_output=(_OUTPUT_8_EXPERTS,),
        ),
        Preset(
            "IQ4_NL", 25, "IQ4_NL", "4.5 bits, non-linear levels, rows of 32 fit",
            attn_v=_IQ4_V, ffn_down=_IQ4_DOWN, attn_output=(_OUTPUT_8_EXPERTS,),
        ),
        Preset("MXFP4_MOE", 38, "MXFP4", "4.25-bit floats for the experts, 8.5 bits for the rest"),
    )
}  # fmt: skip
