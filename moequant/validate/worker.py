"""Runs cases in a process of its own, since a failed assertion in ggml ends the process.

Owns: loading the library, running the cases whose names come on stdin, a line of JSON for each on
stdout. Leaves out: time limits and what an end of this process means (`run`). ggml's own messages
go to stderr.
"""

import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moequant.errors import MoequantError
from moequant.gguf_file import read_model
from moequant.validate import reference
from moequant.validate.cases import (
    NOT_APPLICABLE,
    NOT_CHECKED,
    UNSUPPORTED,
    Case,
    CaseResult,
    judge,
    parse_case,
    route,
)
from moequant.validate.ggml import Ggml, Place
from moequant.validate.graphs import (
    BranchGraph,
    Graph,
    SkipMissingError,
    Stored,
    UnsupportedError,
    run_mul_mat_id,
    store,
)
from moequant.validate.weights import (
    Branch,
    Weight,
    expert_counts,
    is_down,
    read_branch,
    read_tensor,
)


@dataclass(frozen=True)
class WorkerOptions:
    """What all cases of a run share. `rows` and `experts`: None is the default, 0 all."""

    file: str
    library: str
    threads: int
    rows: int | None = None
    experts: int | None = None


class Worker:
    """Runs one case after another; keeps the weights of the last subject, by place."""

    def __init__(self, options: WorkerOptions) -> None:
        self.options = options
        self.file = read_model(Path(options.file))
        self.ggml = Ggml(Path(options.library))
        self._subject: tuple[str, Weight | Branch] | None = None
        self._stored: dict[Place, Stored] = {}
        self._expected: tuple[str, Any] = ("", None)

    def hello(self) -> dict[str, Any]:
        return {
            "version": self.ggml.version,
            "skip": self.ggml.skip is not None,
            "places": [asdict(place) for place in self.ggml.places],
        }

    def run(self, case: Case) -> CaseResult:
        place = next((p for p in self.ggml.places if p.name == case.place), None)
        if place is None:
            return CaseResult(case, NOT_CHECKED, detail=f"this library has no {case.place}")
        if case.routing == "skipped" and (self.ggml.skip is None or case.op == "MOE_BRANCH"):
            why = ("a router skips nothing" if case.op == "MOE_BRANCH"
                   else "this library does not skip negative ids")  # fmt: skip
            return CaseResult(case, NOT_APPLICABLE, detail=why)
        try:
            subject = self._read(case)
            stored = self._store(place, subject)
            if stored.here == 0:
                raise UnsupportedError(f"{place.buffer} takes no tensor of the case")
            if isinstance(subject, Weight):
                return self._mul_mat_id(case, place, subject, stored)
            return self._branch(case, place, subject, stored)
        except UnsupportedError as error:
            return CaseResult(case, UNSUPPORTED, detail=str(error))
        except SkipMissingError:
            why = "expert banks, and this library does not skip negative ids"
            return CaseResult(case, NOT_APPLICABLE, detail=why)
        except NotImplementedError as error:
            return CaseResult(case, NOT_CHECKED, detail=f"gguf-py cannot decode it: {error}")

    def part(self) -> str:
        """Which part of the file's tensors the last case was made of."""
        if self._subject is None:
            return ""
        name, subject = self._subject
        if isinstance(subject, Weight):
            experts, rows, _ = self.file.tensors[name].shape
            return f"{subject.shape[0]} of {experts} experts, {subject.shape[1]} of {rows} rows"
        return (f"{subject.n_experts} of {expert_counts(self.file)[0]} experts, "
                f"{subject.columns} of {subject.all_columns} columns")  # fmt: skip

    def _read(self, case: Case) -> Weight | Branch:
        if self._subject is None or self._subject[0] != case.subject:
            for stored in self._stored.values():
                stored.free()
            self._stored.clear()
            rows, experts = self.options.rows, self.options.experts
            subject: Weight | Branch
            if case.op == "MUL_MAT_ID":
                subject = read_tensor(self.file, case.subject, rows, experts)
            else:
                subject = read_branch(self.file, int(case.subject[4:]), experts, rows)
            self._subject = (case.subject, subject)
        return self._subject[1]

    def _store(self, place: Place, subject: Weight | Branch) -> Stored:
        if place not in self._stored:
            weights = [subject] if isinstance(subject, Weight) else [
                *(bank for stack in subject.stacks.values() for bank in stack.banks),
                *subject.others.values(),
            ]  # fmt: skip
            self._stored[place] = store(self.ggml, place, weights)
        return self._stored[place]

    def _mul_mat_id(self, case: Case, place: Place, weight: Weight, stored: Stored) -> CaseResult:
        random = np.random.default_rng(case.seed)
        n_experts, rows, cols = weight.shape
        k = min(expert_counts(self.file)[1], n_experts)
        ids = route(case, n_experts, k, random)
        slots = ids.shape[1] if is_down(weight.name) else 1
        x = random.standard_normal((case.tokens, slots, cols), np.float32)
        expected = self._reference(
            case, lambda: reference.mul_mat_id(weight, x.astype(np.float64), ids)
        )
        graph = Graph(self.ggml, place, self.options.threads)
        try:
            got = run_mul_mat_id(graph, stored.tensors[weight.name], x, ids, rows,
                                 skip=case.routing == "skipped")  # fmt: skip
        finally:
            graph.context.free()
        return judge(case, got, expected)

    def _branch(self, case: Case, place: Place, branch: Branch, stored: Stored) -> CaseResult:
        random = np.random.default_rng(case.seed)
        ids = route(case, branch.n_experts, branch.k, random)
        x = random.standard_normal((case.tokens, branch.width), np.float32)
        x64 = x.astype(np.float64)
        bias = reference.routing_bias(reference.router_logits(branch, x64), ids)
        expected = self._reference(case, lambda: reference.branch_outputs(branch, x64, bias, ids))
        graph = Graph(self.ggml, place, self.options.threads)
        try:
            got = BranchGraph(graph, branch, stored, case.tokens).run(x, bias)
        finally:
            graph.context.free()
        judged = [judge(case, got[name], expected[name]) for name in expected]
        return max(judged, key=lambda result: (bool(result.detail), result.nmse))

    def _reference(self, case: Case, compute: Any) -> Any:
        """The case's expected output, kept until another case's is asked for."""
        key = f"{case.op},{case.subject},{case.tokens},{case.routing}"
        if self._expected[0] != key:
            self._expected = (key, compute())
        return self._expected[1]


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
        for line in sys.stdin:
            result = worker.run(parse_case(line.rstrip("\n")))
            answer({**asdict(result), "case": result.case.name, "part": worker.part()})
    except (MoequantError, OSError) as error:
        answer({"error": str(error)})


if __name__ == "__main__":
    main(WorkerOptions(**json.loads(sys.argv[1])))
