"""The graphs that are run: MUL_MAT_ID or ADD_ID alone, and the MoE branch as llama.cpp builds it.

Owns: building them op by op in llama.cpp's order (`llm_graph_context::build_moe_ffn` and the layers
of gemma4 and qwen3moe in the pinned source), where weights lie, and computing. Leaves out: what the
outputs should be.

Weights go where llama.cpp would put them: into the case's buffer type where the device supports
their op there, or else into the device's own buffers. Everything else starts as NaN.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moequant.errors import LlamaCppError
from moequant.validate.ggml import F32, I32, SORT_DESCENDING, Context, Ggml, Place, Pointer
from moequant.validate.weights import DENSE, ROUTER, SCALE, Branch, Stack, Weight, is_bias

SMALLEST_SUM = 6.103515625e-5
PROBE_TOKENS = 2  # of the op that a device is asked about


class UnsupportedError(Exception):
    """The device, or all buffers of the place, do not take an op; llama.cpp would go elsewhere."""


class SkipMissingError(Exception):
    """The case needs MUL_MAT_ID to skip negative ids, and this library has no such thing."""


@dataclass(frozen=True)
class Stored:
    """Weights in a device's memory, `tensors` by weight name."""

    tensors: dict[str, Pointer]
    contexts: list[Context]

    def free(self) -> None:
        for context in self.contexts:
            context.free()


def store(ggml: Ggml, place: Place, weights: Sequence[Weight]) -> Stored:
    """Puts `weights` into memory: matrices at `place` if their op is supported there.

    Raises:
        UnsupportedError: none is, or one is nowhere on the device; nothing is read then.
    """
    homes = [_home(ggml, place, weight) for weight in weights]
    if place not in homes:
        raise UnsupportedError(f"{place.buffer} takes no tensor of the case")
    stored = Stored({}, [])
    try:
        for weight, home in zip(weights, homes, strict=True):
            stored.contexts.append(context := Context(ggml))
            tensor = context.tensor(weight.type_id, weight.shape)
            context.allocate(ggml.buffer_type(home), weights=True)
            context.set(tensor, weight.data())
            stored.tensors[weight.name] = tensor
    except BaseException:
        stored.free()
        raise
    return stored


def _own(ggml: Ggml, place: Place) -> Place:
    """The device's own buffers."""
    return next(p for p in ggml.places if p.device == place.device)


def _home(ggml: Ggml, place: Place, weight: Weight) -> Place:
    """Where llama.cpp would put it: at `place`, or else into the device's own buffers."""
    own = _own(ggml, place)
    if not ggml.knows(weight.type_id, weight.qtype):
        raise UnsupportedError(f"this library has no type {weight.qtype}")
    if len(weight.shape) == 1:
        return own
    for candidate in dict.fromkeys((place, own)):
        if _supported(ggml, candidate, weight):
            return candidate
    what = "add biases of" if is_bias(weight.name) else f"multiply by {weight.qtype}"
    raise UnsupportedError(f"{place.device} does not {what} experts")


def _supported(ggml: Ggml, place: Place, weight: Weight) -> bool:
    """Whether the device takes such matrices or biases in such a buffer; asked with two of them."""
    several = len(weight.shape) == 3 or is_bias(weight.name)
    shape = (min(2, weight.shape[0]), *weight.shape[1:]) if several else weight.shape
    weights, context = Context(ggml), Context(ggml)
    try:
        matrix = weights.tensor(weight.type_id, shape)
        weights.allocate(ggml.buffer_type(place), weights=True)
        if is_bias(weight.name):
            x = context.tensor(F32, (PROBE_TOKENS, 1, shape[-1]))
            op = context.op("add_id", x, matrix, context.tensor(I32, (PROBE_TOKENS, 1)))
        elif len(shape) == 3:
            x = context.tensor(F32, (PROBE_TOKENS, 1, shape[-1]))
            op = context.op("mul_mat_id", matrix, x, context.tensor(I32, (PROBE_TOKENS, 1)))
        else:
            op = context.op("mul_mat", matrix, context.tensor(F32, (PROBE_TOKENS, shape[-1])))
        return bool(ggml.call("ggml_backend_dev_supports_op", ggml.device(place), op))
    finally:
        context.free()
        weights.free()


class Graph:
    """A graph with its inputs; built, then computed as often as one likes."""

    def __init__(self, ggml: Ggml, place: Place) -> None:
        self.ggml, self.place = ggml, place
        self.context = Context(ggml)
        self.pointer = ggml.call("ggml_new_graph", self.context.pointer)
        self._inputs: list[tuple[Pointer, npt.NDArray[Any]]] = []

    def input(self, values: npt.NDArray[Any]) -> Pointer:
        tensor = self.context.tensor(I32 if values.dtype == np.int32 else F32, values.shape)
        self._inputs.append((tensor, values))
        return tensor

    def expand(self, tensor: Pointer) -> None:
        self.ggml.call("ggml_build_forward_expand", self.pointer, tensor)

    def mul_mat_id(self, weight: Pointer, x: Pointer, ids: Pointer, *, skip: bool) -> Pointer:
        op = self.context.op("mul_mat_id", weight, x, ids)
        if skip and not self.place.skips:
            raise SkipMissingError
        if skip:
            self.ggml.skip(self.place, op)
        return op

    def allocate(self) -> None:
        """Memory for the graph, once it is built.

        Raises:
            UnsupportedError: the device does not support an op.
        """
        device = self.ggml.device(self.place)
        for index in range(self.ggml.call("ggml_graph_n_nodes", self.pointer)):
            node = self.ggml.call("ggml_graph_node", self.pointer, index)
            if not self.ggml.call("ggml_backend_dev_supports_op", device, node):
                raise UnsupportedError(f"{self.place.device} does not support op {index + 1}")
        self.context.allocate(self.ggml.buffer_type(_own(self.ggml, self.place)))

    def compute(self, threads: int) -> None:
        """Runs the graph on its device, on buffers full of NaN."""
        self.context.poison()
        for tensor, values in self._inputs:
            self.context.set(tensor, values)
        backend = self.ggml.backend(self.place, threads)
        status = self.ggml.call("ggml_backend_graph_compute", backend, self.pointer)
        if status != 0:
            raise LlamaCppError(f"the backend gave up with status {status}")


class BranchGraph:
    """A layer's MoE branch in a graph, in llama.cpp's order of ops."""

    def __init__(self, graph: Graph, branch: Branch, stored: Stored, tokens: int) -> None:
        self.graph, self.branch, self.tensors, self.tokens = graph, branch, stored.tensors, tokens
        self.op = graph.context.op

    def build(
        self, x: npt.NDArray[np.float32], bias: npt.NDArray[np.float32]
    ) -> dict[str, Pointer]:
        """The outputs by the names of `reference.branch_outputs`, [tokens, width] each."""
        given, added = self.graph.input(x), self.graph.input(bias)
        outputs = self._gemma4(given, added) if self.branch.family == "gemma4" else {
            "experts": self._qwen3moe(given, added)}  # fmt: skip
        for output in outputs.values():
            self.graph.expand(output)
        return outputs

    def _tensor(self, name: str) -> Pointer:
        return self.tensors[self.branch.others[name].name]

    def _norm(self, x: Pointer, name: str) -> Pointer:
        return self.op("mul", self.op("rms_norm", x, self.branch.eps), self._tensor(name))

    def _gemma4(self, x: Pointer, bias: Pointer) -> dict[str, Pointer]:
        dense = (
            self._dense(self._norm(x, "ffn_norm.weight"))
            if DENSE[2] in self.branch.others
            else None
        )
        if dense is not None:
            dense = self._norm(dense, "post_ffw_norm_1.weight")
        normed = self._norm(x, "pre_ffw_norm_2.weight")
        routed = self.op("rms_norm", x, self.branch.eps)
        routed = self.op("scale", routed, 1 / math.sqrt(self.branch.width))
        routed = self.op("mul", routed, self._tensor("ffn_gate_inp.scale"))
        logits = self.op("mul_mat", self._tensor(ROUTER), routed)
        experts = self._experts(normed, logits, bias, "geglu_split")
        experts = self._norm(experts, "post_ffw_norm_2.weight")
        if dense is None:
            return {"experts": experts}
        return {"experts": experts, "combined": self.op("add", dense, experts)}

    def _qwen3moe(self, x: Pointer, bias: Pointer) -> Pointer:
        normed = self._norm(x, "ffn_norm.weight")
        logits = self.op("mul_mat", self._tensor(ROUTER), normed)
        return self._experts(normed, logits, bias, "swiglu_split")

    def _dense(self, x: Pointer) -> Pointer:
        gate, up, down = (self._tensor(name) for name in DENSE)
        above, beside = self.op("mul_mat", up, x), self.op("mul_mat", gate, x)
        return self.op("mul_mat", down, self.op("geglu_split", beside, above))

    def _experts(self, x: Pointer, logits: Pointer, bias: Pointer, glu: str) -> Pointer:
        n, k, tokens, width = self.branch.n_experts, self.branch.k, self.tokens, self.branch.width
        probs = self.op("soft_max", self.op("add", logits, bias))
        order = self.op("argsort", probs, SORT_DESCENDING)
        ids = self.op("view_2d", order, k, tokens, n * 4, 0)
        gates = self._gates(self.op("reshape_3d", probs, 1, n, tokens), ids)
        self.graph.expand(gates)
        x = self.op("reshape_3d", x, width, 1, tokens)
        gate, up = self._gate_and_up(x, ids)
        down = self._stack(self.branch.stacks["down"], self.op(glu, gate, up), ids)
        if SCALE in self.branch.others:
            scale = self.op("reshape_3d", self._tensor(SCALE), 1, n, 1)
            scale = self.op("repeat_4d", scale, 1, n, tokens, 1)
            down = self.op("mul", down, self.op("get_rows", scale, ids))
        weighted = self.op("mul", down, gates)
        self.graph.expand(weighted)
        return self._sum(weighted)

    def _gates(self, probs: Pointer, ids: Pointer) -> Pointer:
        k, tokens = self.branch.k, self.tokens
        gates = self.op("reshape_2d", self.op("get_rows", probs, ids), k, tokens)
        total = self.op("clamp", self.op("sum_rows", gates), SMALLEST_SUM, math.inf)
        gates = self.op("reshape_3d", self.op("div", gates, total), 1, k, tokens)
        return gates if self.branch.scale == 1.0 else self.op("scale", gates, self.branch.scale)

    def _gate_and_up(self, x: Pointer, ids: Pointer) -> tuple[Pointer, Pointer]:
        stacks, k = self.branch.stacks, self.branch.k
        if "gate_up" not in stacks:
            up = self._stack(stacks["up"], x, ids)
            return self._stack(stacks["gate"], x, ids), up
        both = self._stack(stacks["gate_up"], x, ids)
        width = stacks["gate_up"].banks[0].shape[1] // 2
        shape = (width, k, self.tokens, 2 * width * 4, 2 * width * k * 4)
        return self.op("view_3d", both, *shape, 0), self.op("view_3d", both, *shape, width * 4)

    def _stack(self, stack: Stack, x: Pointer, ids: Pointer) -> Pointer:
        """MUL_MAT_ID by the stack, or by each of its banks with the others' slots skipped."""
        weights = [self.tensors[bank.name] for bank in stack.banks]
        if len(weights) == 1:
            return self.graph.mul_mat_id(weights[0], x, ids, skip=False)
        k, tokens, n = self.branch.k, self.tokens, self.branch.n_experts
        flat = self.op("reshape_1d", self.op("cont", ids), k * tokens)
        table = self.graph.input(stack.table)
        parts = []
        for bank, weight in enumerate(weights):
            column = self.op("view_2d", table, 1, n, 4, bank * n * 4)
            mapped = self.op("reshape_2d", self.op("get_rows", column, flat), k, tokens)
            parts.append(self.graph.mul_mat_id(weight, x, mapped, skip=True))
        total = parts[0]
        for part in parts[1:]:
            total = self.op("add", total, part)
        return total

    def _sum(self, weighted: Pointer) -> Pointer:
        k, tokens, width = self.branch.k, self.tokens, self.branch.width
        views = [self.op("view_2d", weighted, width, tokens, k * width * 4, slot * width * 4)
                 for slot in range(k)]  # fmt: skip
        for view in views:
            self.graph.expand(view)
        total = views[0]
        for view in views[1:]:
            total = self.op("add", total, view)
            self.graph.expand(total)
        return total if k > 1 else self.op("cont", total)
