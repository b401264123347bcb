"""Runs cases in a process of its own, since a failed assertion in ggml ends the process.

Owns: loading the library, running the cases whose names come on stdin. For each it writes a line of
JSON to stdout when weights and reference are there and the kernels start, and one with the result.
Leaves out: time limits and what an end of this process means (`run`). ggml's own messages go to
stderr.

Each graph is computed several times. On the CPU that is with different numbers of threads, which
must not change a bit: threads divide rows among them and never a sum.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moequant.errors import MoequantError
from moequant.gguf_file import read_model
from moequant.validate import reference
from moequant.validate.cases import (
    ADD_ID,
    ERROR,
    FAILED,
    MUL_MAT_ID,
    NOT_APPLICABLE,
    NOT_CHECKED,
    SKIPPING,
    UNSUPPORTED,
    Case,
    CaseResult,
    Errors,
    errors,
    inputs,
    judge,
    limits,
    parse_case,
    route_branch,
    route_op,
)
from moequant.validate.ggml import Ggml, Place, Pointer
from moequant.validate.graphs import (
    BranchGraph,
    Graph,
    SkipMissingError,
    Stored,
    UnsupportedError,
    store,
)
from moequant.validate.weights import (
    Branch,
    Tensor,
    Weight,
    experts_used,
    is_down,
    read_biases,
    read_branch,
    read_tensor,
)

Outputs = Mapping[str, npt.NDArray[np.float32]]
Judge = Callable[[Outputs], CaseResult]
Ready = Callable[[], None]


@dataclass(frozen=True)
class WorkerOptions:
    """What all cases share. `rows` as in `reference.Rows`; `memory`: bytes of weights of a case."""

    file: str
    library: str
    threads: int
    rows: int | None
    memory: int


class Worker:
    """Runs one case after another; keeps what it read of the last subject, at the last place."""

    def __init__(self, options: WorkerOptions) -> None:
        self.options = options
        self.file = read_model(Path(options.file))
        self.ggml = Ggml(Path(options.library))
        self._subject: tuple[str, Tensor | Branch] | None = None
        self._rows: reference.Rows | None = None
        self._stored: tuple[Place, Stored] | None = None

    def hello(self) -> dict[str, Any]:
        return {
            "version": self.ggml.version,
            "places": [asdict(place) for place in self.ggml.places],
        }

    def run(self, case: Case, ready: Ready) -> CaseResult:
        """Calls `ready` right before the kernels start, if they do."""
        place = next((p for p in self.ggml.places if p.name == case.place), None)
        if place is None:
            return CaseResult(case, NOT_CHECKED, detail=f"this library has no {case.place}")
        if case.routing in SKIPPING and (not place.skips or case.op != MUL_MAT_ID):
            why = ("a router skips nothing" if case.op != MUL_MAT_ID
                   else f"{place.device} does not skip negative ids")  # fmt: skip
            return CaseResult(case, NOT_APPLICABLE, detail=why)
        try:
            subject = self._read(case)
            if isinstance(subject, Tensor) and case.op == ADD_ID:
                result = self._add_id(case, place, subject, ready)
            elif isinstance(subject, Tensor):
                result = self._mul_mat_id(case, place, subject, ready)
            else:
                result = self._branch(case, place, subject, ready)
            return replace(result, part=subject.part)
        except UnsupportedError as error:
            return CaseResult(case, UNSUPPORTED, detail=str(error))
        except SkipMissingError:
            why = f"expert banks, and {place.device} does not skip negative ids"
            return CaseResult(case, NOT_APPLICABLE, detail=why)
        except NotImplementedError as error:
            return CaseResult(case, NOT_CHECKED, detail=f"gguf-py cannot decode it: {error}")
        except Exception as error:  # of any kind: no word on the kernels, and not the end
            return CaseResult(case, ERROR, detail=f"{type(error).__name__}: {error}")

    def _read(self, case: Case) -> Tensor | Branch:
        if self._subject is None or self._subject[0] != case.subject:
            self._free()
            subject: Tensor | Branch
            self._rows = None
            if case.op == MUL_MAT_ID:
                subject = read_tensor(self.file, case.subject, self.options.memory)
                self._rows = reference.Rows(subject.weight, self.options.rows)
            elif case.op == ADD_ID:
                subject = read_biases(self.file, case.subject)
            else:
                subject = read_branch(self.file, int(case.subject[4:]), self.options.memory)
            self._subject = (case.subject, subject)
        return self._subject[1]

    def _free(self) -> None:
        if self._stored is not None:
            self._stored[1].free()
            self._stored = None

    def _at(self, place: Place, weights: list[Weight]) -> Stored:
        if self._stored is None or self._stored[0] != place:
            self._free()
            self._stored = (place, store(self.ggml, place, weights))
        return self._stored[1]

    def _mul_mat_id(self, case: Case, place: Place, tensor: Tensor, ready: Ready) -> CaseResult:
        weight, random = tensor.weight, np.random.default_rng(case.seed)
        stored = self._at(place, [weight])
        assert self._rows is not None
        ids = route_op(case, tensor.table, experts_used(self.file), random)
        slots = ids.shape[1] if is_down(weight.name) else 1
        x = inputs(case, (case.tokens, slots, weight.shape[-1]), random)
        expected = reference.mul_mat_id(self._rows, x.astype(np.float64), ids)
        limit = limits(case, [weight.qtype], place.backend)

        def judged(outputs: Outputs) -> CaseResult:
            got = outputs["product"]
            if (got[ids < 0] != 0).any():
                return judge(case, Errors(), limit, "a slot that is skipped is not zero")
            if wrong := _not_finite(outputs):
                return judge(case, Errors(), limit, wrong)
            there = np.take_along_axis(got[ids >= 0], expected.rows, axis=1)
            return judge(case, errors(there, expected.values, expected.scale), limit)

        graph = Graph(self.ggml, place)
        try:
            skip = bool((tensor.table < 0).any()) or case.routing in SKIPPING
            product = graph.mul_mat_id(
                stored.tensors[weight.name], graph.input(x), graph.input(ids), skip=skip
            )
            graph.expand(product)
            outputs = {"product": (product, (*ids.shape, weight.shape[1]))}
            return self._computed(graph, outputs, judged, ready)
        finally:
            graph.context.free()

    def _add_id(self, case: Case, place: Place, tensor: Tensor, ready: Ready) -> CaseResult:
        biases, random = tensor.weight, np.random.default_rng(case.seed)
        stored = self._at(place, [biases])
        ids = route_op(case, tensor.table, experts_used(self.file), random)
        x = inputs(case, (*ids.shape, biases.shape[-1]), random)
        x *= np.sqrt((biases.values() ** 2).mean()) or np.float32(1)  # so that neither hides
        expected, scale = reference.add_id(biases, x.astype(np.float64), ids)
        limit = limits(case, [biases.qtype], place.backend)

        def judged(outputs: Outputs) -> CaseResult:
            if wrong := _not_finite(outputs):
                return judge(case, Errors(), limit, wrong)
            return judge(case, errors(outputs["sum"], expected, scale), limit)

        graph = Graph(self.ggml, place)
        try:
            added = graph.context.op(
                "add_id", graph.input(x), stored.tensors[biases.name], graph.input(ids)
            )
            graph.expand(added)
            return self._computed(graph, {"sum": (added, x.shape)}, judged, ready)
        finally:
            graph.context.free()

    def _branch(self, case: Case, place: Place, branch: Branch, ready: Ready) -> CaseResult:
        random = np.random.default_rng(case.seed)
        stored = self._at(place, branch.weights)
        ids, checked = route_branch(case, branch.n_experts, branch.k, branch.known, random)
        x = inputs(case, (case.tokens, branch.width), random)
        x64 = x.astype(np.float64)
        bias = reference.routing_bias(reference.router_logits(branch, x64), ids)
        expected = reference.branch_outputs(branch, x64[checked], bias[checked], ids[checked])
        qtypes = [weight.qtype for weight in branch.weights if len(weight.shape) > 1]
        limit = limits(case, qtypes, place.backend)

        def judged(outputs: Outputs) -> CaseResult:
            if wrong := _not_finite(outputs):
                return judge(case, Errors(), limit, wrong)
            sizes = {name: np.sqrt((values**2).mean(axis=1, keepdims=True))
                     for name, values in expected.items()}  # fmt: skip
            return _worst([
                judge(case, errors(outputs[name][checked], expected[name], sizes[name]), limit)
                for name in expected
            ])  # fmt: skip

        graph = Graph(self.ggml, place)
        try:
            built = BranchGraph(graph, branch, stored, case.tokens).build(x, bias)
            outputs = {name: (pointer, x.shape) for name, pointer in built.items()}
            return self._computed(graph, outputs, judged, ready)
        finally:
            graph.context.free()

    def _computed(
        self, graph: Graph, outputs: Mapping[str, tuple[Pointer, tuple[int, ...]]], judged: Judge,
        ready: Ready,
    ) -> CaseResult:  # fmt: skip
        """The result of computing it several times."""
        graph.allocate()
        ready()
        threads, cpu = self.options.threads, graph.place.backend == "CPU"
        first: Outputs = {}
        results: list[CaseResult] = []
        for count in (threads, 1, max(3, (threads - 1) | 1)) if cpu else (threads, threads):
            graph.compute(count)
            got = {n: graph.context.get(tensor, shape) for n, (tensor, shape) in outputs.items()}
            if not results or not cpu:
                first = got
                results.append(judged(got))
            elif differ := sum(int((got[name] != first[name]).sum()) for name in first):
                detail = f"{differ} values differ between {threads} and {count} threads"
                return replace(results[0], verdict=FAILED, detail=detail)
            if results[-1].detail:
                break
        return _worst(results)


def _worst(results: list[CaseResult]) -> CaseResult:
    return max(results, key=lambda result: (bool(result.detail), result.errors.nmse))


def _not_finite(outputs: Outputs) -> str:
    """What to say of values that are not; nothing if all are."""
    missing = sum(values.size - int(np.isfinite(values).sum()) for values in outputs.values())
    total = sum(values.size for values in outputs.values())
    if not missing:
        return ""
    return f"{missing} of {total} values are not finite: never written, or made of such"


def _leave_no_core() -> None:
    """An abort is expected here, and its core file would be of no use."""
    with suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(options: WorkerOptions) -> None:
    _leave_no_core()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a backend prints is no answer

    def answer(data: dict[str, Any]) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    try:
        worker = Worker(options)
        answer(worker.hello())
    except (MoequantError, OSError) as error:
        answer({"error": str(error)})
        return
    for line in sys.stdin:
        result = worker.run(parse_case(line.rstrip("\n")), lambda: answer({"ready": True}))
        answer({**asdict(result), "case": result.case.name})


if __name__ == "__main__":
    main(WorkerOptions(**json.loads(sys.argv[1])))
