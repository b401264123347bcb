"""What a case's output should be, in numpy: float64 over gguf-py's dequantized weights.

Owns: that arithmetic, written after llama.cpp's graphs of the two families (`build_moe_ffn` and the
layer around it). Leaves out: kernels. Nothing here is shared with the graphs that are checked.
"""

import numpy as np
import numpy.typing as npt

from moequant.validate.weights import Branch, Weight

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]
SMALLEST_SUM = 6.103515625e-5  # llama.cpp clamps the sum of a token's gates to this
ROUTING_MARGIN = 1.0  # by which the wanted experts' logits lead


def mul_mat_id(weight: Weight, x: Floats, ids: Ids) -> Floats:
    """[tokens, slots, rows] of x [tokens, 1 or slots, in]; zeros where the id is negative."""
    out = np.zeros((*ids.shape, weight.shape[1]))
    x = np.broadcast_to(x, (*ids.shape, x.shape[-1]))
    for expert in np.unique(ids[ids >= 0]):
        mine = ids == expert
        out[mine] = x[mine] @ weight.values[expert].T
    return out


def rms_norm(x: Floats, eps: float, weight: Weight | None = None) -> Floats:
    normed = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    return np.asarray(normed if weight is None else normed * weight.values)


def silu(x: Floats) -> Floats:
    return np.asarray(x / (1 + np.exp(-x)))


def gelu(x: Floats) -> Floats:
    """The tanh form."""
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def router_logits(branch: Branch, x: Floats) -> Floats:
    """[tokens, experts], without what `routing_bias` adds."""
    router = branch.others["ffn_gate_inp.weight"].values
    if branch.family == "gemma4":
        scale = branch.others["ffn_gate_inp.scale"].values
        return np.asarray(rms_norm(x, branch.eps) / np.sqrt(branch.width) * scale @ router.T)
    return rms_norm(x, branch.eps, branch.others["ffn_norm.weight"]) @ router.T


def routing_bias(logits: Floats, ids: Ids) -> npt.NDArray[np.float32]:
    """What to add to the logits so that each token's top k are its `ids`, by a margin."""
    bias = np.zeros(logits.shape, np.float32)
    lift = logits.max(axis=1, keepdims=True) - logits.min(axis=1, keepdims=True) + ROUTING_MARGIN
    np.put_along_axis(bias, ids, lift.astype(np.float32), axis=1)
    return bias


def branch_outputs(
    branch: Branch, x: Floats, bias: npt.NDArray[np.float32], ids: Ids
) -> dict[str, Floats]:
    """`experts`: the branch's own output; `combined`: with the dense one added, where there is one.

    `ids` are each token's k experts with the largest of logits plus `bias`.
    """
    logits = router_logits(branch, x) + bias
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    gates = np.take_along_axis(exponentials / exponentials.sum(axis=1, keepdims=True), ids, axis=1)
    gates = gates / np.maximum(gates.sum(axis=1, keepdims=True), SMALLEST_SUM) * branch.scale
    gemma = branch.family == "gemma4"
    before = branch.others["pre_ffw_norm_2.weight" if gemma else "ffn_norm.weight"]
    outputs = _experts(branch, rms_norm(x, branch.eps, before), ids)
    experts = (outputs * gates[..., None]).sum(axis=1)
    if not gemma:
        return {"experts": experts}
    experts = rms_norm(experts, branch.eps, branch.others["post_ffw_norm_2.weight"])
    return {"experts": experts, "combined": experts + _dense(branch, x)}


def _experts(branch: Branch, x: Floats, ids: Ids) -> Floats:
    """Each token's k experts' outputs, [tokens, k, width]."""
    out = np.zeros((*ids.shape, branch.width))
    scale = branch.others.get("ffn_down_exps.scale")
    for expert in map(int, np.unique(ids)):
        tokens, slots = np.nonzero(ids == expert)
        down = branch.stacks["down"].values(expert)
        if "gate_up" in branch.stacks:
            both = x[tokens] @ branch.stacks["gate_up"].values(expert).T
            gate, up = np.split(both, 2, axis=1)
        else:
            gate, up = (x[tokens] @ branch.stacks[kind].values(expert).T for kind in ("gate", "up"))
        act = gelu(gate) if branch.family == "gemma4" else silu(gate)
        factor = 1.0 if scale is None else scale.values[expert]
        out[tokens, slots] = (act * up) @ down.T * factor
    return out


def _dense(branch: Branch, x: Floats) -> Floats:
    others = branch.others
    x = rms_norm(x, branch.eps, others["ffn_norm.weight"])
    gate, up = (x @ others[f"ffn_{kind}.weight"].values.T for kind in ("gate", "up"))
    out = (gelu(gate) * up) @ others["ffn_down.weight"].values.T
    return rms_norm(out, branch.eps, others["post_ffw_norm_1.weight"])
