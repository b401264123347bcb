"""What a case's output should be, in numpy: float64 over gguf-py's dequantized weights.

Owns: that arithmetic, written after llama.cpp's graphs of the two families (`build_moe_ffn` and the
layer around it), and which rows of a large tensor it is done for. Leaves out: kernels. Nothing here
is shared with the graphs that are checked.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moequant.validate.cases import spots
from moequant.validate.weights import DENSE, ROUTER, SCALE, Branch, Weight

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]
SMALLEST_SUM = 6.103515625e-5  # llama.cpp clamps the sum of a token's gates to this
ROUTING_MARGIN = 1.0  # by which the wanted experts' logits lead
SAMPLED_VALUES = 1 << 24  # decoded of a tensor, unless told otherwise
LEAST_ROWS = 64


class Rows:
    """The rows of each matrix of `weight` that are computed, the same ones in all its cases.

    `count` of each: all for 0, and for None as many as SAMPLED_VALUES allow. Both ends and the
    edges of tiles are among them, the others differ from matrix to matrix.
    """

    def __init__(self, weight: Weight, count: int | None) -> None:
        matrices, rows, columns = weight.shape
        if count is None:
            count = max(LEAST_ROWS, SAMPLED_VALUES // (matrices * columns))
        self.weight, self.count = weight, min(rows, count or rows)
        self._kept: dict[int, tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]] = {}

    def of(self, matrix: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
        """(rows, their values [rows, in])"""
        if matrix not in self._kept:
            random = np.random.default_rng([matrix, *self.weight.name.encode()])
            rows = spots(self.weight.shape[1], self.count, random)
            self._kept[matrix] = rows, self.weight.decode(matrix, rows)
        return self._kept[matrix]


@dataclass(frozen=True)
class Products:
    """Of MUL_MAT_ID, at the rows that are computed: which, their values, and |w|·|x|/√n of each.

    All are [slots that are not skipped, rows].
    """

    rows: npt.NDArray[np.intp]
    values: Floats
    scale: Floats


def mul_mat_id(rows: Rows, x: Floats, ids: Ids) -> Products:
    """Of x [tokens, 1 or slots, in], in the order of the ids that are not negative."""
    x = np.broadcast_to(x, (*ids.shape, x.shape[-1]))[ids >= 0]
    kept = ids[ids >= 0]
    shape = (len(kept), rows.count)
    which, values, scale = np.zeros(shape, np.intp), np.zeros(shape), np.zeros(shape)
    for expert in map(int, np.unique(kept)):
        mine = kept == expert
        which[mine], weights = rows.of(expert)
        weights = weights.astype(np.float64)
        values[mine] = x[mine] @ weights.T
        lengths = np.outer(np.linalg.norm(x[mine], axis=1), np.linalg.norm(weights, axis=1))
        scale[mine] = lengths / np.sqrt(x.shape[-1])
    return Products(which, values, scale)


def add_id(biases: Weight, x: Floats, ids: Ids) -> tuple[Floats, Floats]:
    """(x [tokens, slots, rows] with each slot's bias added; the size of what was added up)"""
    added = biases.values().astype(np.float64)[ids]
    return x + added, np.abs(x) + np.abs(added)


def rms_norm(x: Floats, eps: float, weight: Weight | None = None) -> Floats:
    normed = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    return np.asarray(normed if weight is None else normed * weight.vector())


def silu(x: Floats) -> Floats:
    return np.asarray(x / (1 + np.exp(-x)))


def gelu(x: Floats) -> Floats:
    """The tanh form."""
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def router_logits(branch: Branch, x: Floats) -> Floats:
    """[tokens, experts], without what `routing_bias` adds."""
    router = branch.others[ROUTER].values()
    if branch.family == "gemma4":
        scale = branch.others["ffn_gate_inp.scale"].vector()
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

    `ids` are each token's k experts with the largest of logits plus `bias`; they are decoded.
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
    if DENSE[2] not in branch.others:
        return {"experts": experts}
    return {"experts": experts, "combined": experts + _dense(branch, x)}


def _experts(branch: Branch, x: Floats, ids: Ids) -> Floats:
    """Each token's k experts' outputs, [tokens, k, width]."""
    out = np.zeros((*ids.shape, branch.width))
    scale = branch.others.get(SCALE)
    for expert in map(int, np.unique(ids)):
        tokens, slots = np.nonzero(ids == expert)
        down = branch.stacks["down"].values(expert)
        if "gate_up" in branch.stacks:
            both = x[tokens] @ branch.stacks["gate_up"].values(expert).T
            gate, up = np.split(both, 2, axis=1)
        else:
            gate, up = (x[tokens] @ branch.stacks[kind].values(expert).T for kind in ("gate", "up"))
        act = gelu(gate) if branch.family == "gemma4" else silu(gate)
        factor = 1.0 if scale is None else scale.vector()[expert]
        out[tokens, slots] = (act * up) @ down.T * factor
    return out


def _dense(branch: Branch, x: Floats) -> Floats:
    others = branch.others
    x = rms_norm(x, branch.eps, others["ffn_norm.weight"])
    gate, up = (x @ others[f"ffn_{kind}.weight"].values().T for kind in ("gate", "up"))
    out = (gelu(gate) * up) @ others["ffn_down.weight"].values().T
    return rms_norm(out, branch.eps, others["post_ffw_norm_1.weight"])
