"""Sums of expert banks, built op by op as llama.cpp builds them and computed on the CPU.

Owns: the graphs, their inputs, and what numpy makes of these. Run as a program, in a process of its
own since ggml reads GGML_CPU_DISABLE_FUSION but once, it computes all `SUMS` with the libraries of
a folder. Leaves out: what should come out.

ggml's graph allocator gives out the memory, so that a sum gets its first product's; what lies in it
before the graph runs is NaN.
"""

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from moequant.validate.ggml import POISON, SIGNATURES, Context, Ggml, N, P, Place, Pointer

TOKENS, SLOTS, EXPERTS, ROWS, COLUMNS = 5, 2, 6, 16, 64
THREADS = 2
MORE = {
    "ggml_add_inplace": (P, (P, P, P)),
    "ggml_build_forward_select": (P, (P, ctypes.POINTER(P), N, N)),
    "ggml_gallocr_new": (P, (P,)),
    "ggml_gallocr_alloc_graph": (ctypes.c_bool, (P, P)),
    "ggml_gallocr_free": (None, (P,)),
    "ggml_get_data": (P, (P,)),
    "ggml_set_output": (None, (P,)),
}
# which matrix of each bank is an expert's
TWO = ((0, -1, 1, -1, 2, -1), (-1, 0, -1, 1, -1, 2))
THREE = ((0, -1, -1, 1, -1, -1), (-1, 0, -1, -1, 1, -1), (-1, -1, 0, -1, -1, 1))
HOMELESS = ((0, -1, 1, -1, 2, -1), (-1, 0, -1, 1, -1, -1))
TWICE = ((0, -1, 1, -1, 2, -1), (-1, 0, -1, 1, 2, 2))


@dataclass(frozen=True)
class Sum:
    """`qtypes` of the banks, `repacked` where they lie in CPU_REPACK; `table[b][e]` as in a map.

    `output`: a node that is to be read afterwards, besides the sum; `again`: the product that is
    used a second time; `inputs`: how many different ones the products have; `in_place`: the graph
    itself says so; `first_only`: all is in the graph, but only the first product is to be computed;
    `own_memory`: each node has its own.
    """

    qtypes: tuple[str, ...]
    table: tuple[tuple[int, ...], ...] = TWO
    repacked: tuple[int, ...] = ()
    output: str = ""
    again: int | None = None
    inputs: int = 1
    in_place: bool = False
    first_only: bool = False
    own_memory: bool = False


SUMS = {
    "one type": Sum(("Q8_0", "Q8_0")),
    "two types": Sum(("Q8_0", "F16")),
    "three of one type": Sum(("Q8_0",) * 3, THREE),
    "the last differs": Sum(("Q8_0", "Q8_0", "F16"), THREE),
    "the second differs": Sum(("Q8_0", "F16", "Q8_0"), THREE),
    "floats": Sum(("F32", "F32", "F16"), THREE),
    "one repacked": Sum(("Q4_0", "Q4_0", "Q4_0"), THREE, repacked=(1,)),
    "two repacked": Sum(("Q4_0", "Q4_0", "Q8_0"), THREE, repacked=(0, 1)),
    "in place by name": Sum(("Q8_0", "Q8_0"), in_place=True),
    "an expert in no bank": Sum(("Q8_0", "Q8_0"), HOMELESS),
    "an expert in two banks": Sum(("Q8_0", "Q8_0"), TWICE),
    "the first product is an output": Sum(("Q8_0", "Q8_0"), output="product 0"),
    "the second product is an output": Sum(("Q8_0", "Q8_0"), output="product 1"),
    "the first sum is an output": Sum(("Q8_0",) * 3, THREE, output="sum 1"),
    "the first product is used twice": Sum(("Q8_0", "Q8_0"), again=0),
    "the second product is used twice": Sum(("Q8_0", "Q8_0"), again=1),
    "other inputs": Sum(("Q8_0", "Q8_0"), inputs=2),
    "only the first product is computed": Sum(("Q8_0", "Q8_0"), first_only=True),
    "memory of their own": Sum(("Q8_0", "Q8_0"), own_memory=True),
}


def weights(name: str) -> list[np.ndarray]:
    """The matrices of each bank, encoded, [matrices, rows, row bytes]."""
    case, random = SUMS[name], np.random.default_rng(list(name.encode()))
    return [
        gguf.quantize(
            random.standard_normal((max(row) + 1, ROWS, COLUMNS)).astype(np.float32),
            GGMLQuantizationType[qtype],
        )
        for qtype, row in zip(case.qtypes, case.table, strict=True)
    ]


def inputs(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(x [inputs, tokens, 1, columns], each token's experts [tokens, slots])"""
    random = np.random.default_rng([1, *name.encode()])
    x = random.standard_normal((SUMS[name].inputs, TOKENS, 1, COLUMNS)).astype(np.float32)
    ids = (np.arange(TOKENS * SLOTS) % EXPERTS).reshape(TOKENS, SLOTS).astype(np.int32)
    return x, ids


def products(name: str) -> list[np.ndarray]:
    """What each bank's product should be, [tokens, slots, rows]."""
    case, (x, ids) = SUMS[name], inputs(name)
    found = []
    for bank, data in enumerate(weights(name)):
        values = gguf.dequantize(data, GGMLQuantizationType[case.qtypes[bank]]).astype(np.float64)
        out = np.zeros((TOKENS, SLOTS, ROWS))
        for token, slot in np.ndindex(ids.shape):
            index = case.table[bank][ids[token, slot]]
            if index >= 0:
                out[token, slot] = values[index] @ x[bank % case.inputs, token, 0]
        found.append(out)
    return found


class BankSum:
    """One of `SUMS`, built."""

    def __init__(self, ggml: Ggml, name: str) -> None:
        self.ggml, self.name, self.case = ggml, name, SUMS[name]
        self.place = next(place for place in ggml.places if place.name == "CPU/CPU")
        self.contexts: list[Context] = []
        self.nodes: dict[str, Pointer] = {}

    def _context(self) -> Context:
        self.contexts.append(Context(self.ggml))
        return self.contexts[-1]

    def _stored(self, data: np.ndarray, qtype: str, place: Place, *, weights: bool) -> Pointer:
        context = self._context()
        type_id = GGMLQuantizationType[qtype]
        shape = gguf.quant_shape_from_byte_shape(data.view(np.uint8).shape, type_id)
        tensor = context.tensor(int(type_id), tuple(shape))
        context.allocate(self.ggml.buffer_type(place), weights=weights)
        context.set(tensor, data)
        return tensor

    def build(self, context: Context, graph: Pointer) -> None:
        """The nodes of `SUMS[name]`: "product b", and "sum b" of the products up to it."""
        case, op = self.case, context.op
        repack = next((p for p in self.ggml.places if p.name == "CPU/CPU_REPACK"), self.place)
        x, ids = inputs(self.name)
        xs = [self._stored(each, "F32", self.place, weights=False) for each in x]
        given = self._stored(ids, "I32", self.place, weights=False)
        table = self._stored(np.array(case.table, np.int32), "I32", self.place, weights=False)
        flat = op("reshape_1d", given, TOKENS * SLOTS)
        total = None
        for bank, data in enumerate(weights(self.name)):
            place = repack if bank in case.repacked else self.place
            weight = self._stored(data, case.qtypes[bank], place, weights=True)
            row = op("view_2d", table, 1, EXPERTS, 4, bank * EXPERTS * 4)
            mapped = op("reshape_2d", op("get_rows", row, flat), SLOTS, TOKENS)
            product = op("mul_mat_id", weight, xs[bank % case.inputs], mapped)
            self.ggml.skip(self.place, product)
            self.nodes[f"product {bank}"] = product
            add = "add_inplace" if case.in_place else "add"
            total = product if total is None else op(add, total, product)
            self.nodes[f"sum {bank}"] = total
        assert total is not None
        if case.output:
            self.ggml.call("ggml_set_output", self.nodes[case.output])
        if case.first_only:
            choices = (P * 2)(total, self.nodes["product 0"])
            self.ggml.call("ggml_build_forward_select", graph, choices, 2, 1)
            return
        self.ggml.call("ggml_build_forward_expand", graph, total)
        if case.again is not None:
            again = self.nodes["again"] = op("scale", self.nodes[f"product {case.again}"], 2.0)
            self.ggml.call("ggml_build_forward_expand", graph, again)

    def computed(self) -> dict[str, np.ndarray]:
        """What lies in the memory of the nodes afterwards."""
        context = self._context()
        graph = self.ggml.call("ggml_new_graph", context.pointer)
        self.build(context, graph)
        allocator = self.ggml.call("ggml_gallocr_new", self.ggml.buffer_type(self.place))
        try:
            if self.case.own_memory:
                context.allocate(self.ggml.buffer_type(self.place))
            else:
                assert self.ggml.call("ggml_gallocr_alloc_graph", allocator, graph)
            for node in self.nodes.values():
                ctypes.memset(self.ggml.call("ggml_get_data", node), POISON,
                              self.ggml.call("ggml_nbytes", node))  # fmt: skip
            backend = self.ggml.backend(self.place, THREADS)
            assert self.ggml.call("ggml_backend_graph_compute", backend, graph) == 0
            return {node: context.get(pointer, (TOKENS, SLOTS, ROWS))
                    for node, pointer in self.nodes.items()}  # fmt: skip
        finally:
            self.ggml.call("ggml_gallocr_free", allocator)
            for one in self.contexts:
                one.free()


def main(folder: str, target: str) -> None:
    """Computes all of them into an .npz: "name/node"."""
    SIGNATURES.update(MORE)
    ggml = Ggml(Path(folder))
    found: dict[str, Any] = {f"{name}/{node}": values for name in SUMS for node, values in
                             BankSum(ggml, name).computed().items()}  # fmt: skip
    np.savez(target, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
