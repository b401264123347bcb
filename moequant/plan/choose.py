"""From a preset's name and a model to a plan.

Owns: `preset_plan`. Leaves out: the rules (`rules`, `presets`) and measured allocation to a size.
"""

from moequant.architectures import converter_type
from moequant.errors import PlanError
from moequant.plan import sizes
from moequant.plan.model import Model, Tensor
from moequant.plan.plan import Plan, TensorPlan
from moequant.plan.presets import FLOAT_TYPES, PRESETS, Preset
from moequant.plan.rules import Choice, choose_types


def preset_plan(preset: str, model: Model, *, has_imatrix: bool, base: str = "BF16") -> Plan:
    """The types that the pinned llama-quantize gives this model under a named preset.

    `preset`: one of PRESETS, in any case. `has_imatrix`: whether importance data will be used;
    it changes types under Q4_0, Q5_0, IQ4_XS and IQ4_NL. `base`: the float type of the file that
    llama-quantize would start from, which what is not quantized keeps (vectors, norms and routers
    are F32 whatever it is). The converter's own choice (`--outtype auto`) is BF16 for a bfloat16
    checkpoint, F16 for others.

    For F32, F16 and BF16 the types are the converter's with that `--outtype`, and `base` is not
    used. llama-quantize from F32 agrees but for what it never touches: `per_layer_model_proj`,
    and matrices of one row, stay F32 there.

    PlanError: an unknown preset or base, or a tensor in a layer that the model does not have.
    """
    row = _preset(preset)
    if base not in FLOAT_TYPES:
        raise PlanError(f"base {base!r}: not one of {', '.join(FLOAT_TYPES)}.")
    base = row.default if row.is_float else base
    base_types = {tensor.name: converter_type(tensor, base) for tensor in model.tensors}
    choices = choose_types(row, model, base_types, has_imatrix=has_imatrix)
    tensors = tuple(_tensor_plan(tensor, choices[tensor.name]) for tensor in model.tensors)
    return Plan(row.name, model.architecture, tensors, base, has_imatrix)


def _preset(name: str) -> Preset:
    if name.upper() not in PRESETS:
        raise PlanError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}.")
    return PRESETS[name.upper()]


def _tensor_plan(tensor: Tensor, choice: Choice) -> TensorPlan:
    reason = ""
    if choice.qtype != choice.wanted:
        block = sizes.block_size(choice.wanted)
        reason = f"rows of {tensor.shape[-1]} are not whole blocks of {block}"
    return TensorPlan(tensor.name, tuple(tensor.shape), choice.qtype, choice.wanted, reason)
