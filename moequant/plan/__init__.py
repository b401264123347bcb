"""Plans: a type for every tensor. Names, shapes and sizes in, types out; no torch.

Owns: named presets, the plan and its file, types for single experts, the report of fallbacks.
Leaves out: how weights are encoded, and how an expert's error is measured.
"""

from moequant.plan.choose import preset_plan
from moequant.plan.fallbacks import FallbackRow, fallback_bpw, fallback_rows
from moequant.plan.model import Model, Tensor, role_of
from moequant.plan.per_expert import per_expert_plan, rankable
from moequant.plan.plan import Plan, TensorPlan
from moequant.plan.presets import PRESETS, Preset

__all__ = [
    "PRESETS",
    "FallbackRow",
    "Model",
    "Plan",
    "Preset",
    "Tensor",
    "TensorPlan",
    "fallback_bpw",
    "fallback_rows",
    "per_expert_plan",
    "preset_plan",
    "rankable",
    "role_of",
]
