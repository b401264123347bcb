"""`validate`: every case of a file, each in a process that may abort or hang.

Owns: which cases there are, the process that runs them with its time limit, and what its end means.
Leaves out: the cases' arithmetic (`worker`), and printing.

A process runs case after case; where it aborts or hangs, that is the case's verdict, and the next
case gets a new process. Ctrl-C ends it with this one.
"""

import json
import os
import queue
import shlex
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from moequant.errors import GGUFError, LlamaCppError, UsageError
from moequant.expert_banks import has_banks, stock_error
from moequant.gguf_file import GGUFFile, read_model
from moequant.runtime.llama_cpp import ensure_built
from moequant.validate.cases import (
    ABORTED,
    FAILED,
    FINDINGS,
    HUNG,
    NMSE_LIMITS,
    NOT_CHECKED,
    OPS,
    PASSED,
    ROUTINGS,
    TOKENS,
    Case,
    CaseResult,
    parse_case,
)
from moequant.validate.ggml import Place, library_folder
from moequant.validate.weights import (
    FAMILIES,
    KINDS,
    distinct_layers,
    distinct_tensors,
    expert_tensors,
)
from moequant.validate.worker import WorkerOptions

STARTUP = 120.0  # seconds until a process must have loaded the library
MOST_ENDS = 2  # aborts and hangs of one subject at one place, after which its rest is left out
LOG_TAIL = 4  # lines of a dead process's log that tell why
# a failed assertion starts a debugger otherwise; and threads that wait by spinning make a busy
# machine four times slower (29 s against 7 s), which OMP_WAIT_POLICY below is for
ENVIRONMENT = {"GGML_NO_BACKTRACE": "1"}
SEVERITY = (HUNG, ABORTED, FAILED)

Progress = Callable[[str, int, int], None]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """What cases are about: a tensor, or a layer's branch; `what` is its types and shape."""

    op: str
    name: str
    what: str


@dataclass(frozen=True)
class Validation:
    """All results. `missing` are the backends that were asked for and are not there."""

    file: Path
    library: Path
    version: str
    skip: bool
    places: tuple[Place, ...]
    subjects: tuple[Subject, ...]
    results: tuple[CaseResult, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    options: WorkerOptions

    @property
    def findings(self) -> list[CaseResult]:
        return [result for result in self.results if result.verdict in FINDINGS]

    @property
    def checked(self) -> int:
        """Cases that ended with a verdict on the kernels."""
        return sum(result.verdict in (PASSED, *FINDINGS) for result in self.results)

    @property
    def worst(self) -> CaseResult | None:
        """The case that hangs, or aborts, or is furthest from its limit; None without any."""
        told = [result for result in self.results if result.verdict in (PASSED, *FINDINGS)]
        return max(told, key=badness, default=None)

    def command(self, result: CaseResult) -> str:
        """What repeats exactly this case."""
        options = self.options
        words = ["moequant", "validate", str(self.file), "--library", str(self.library),
                 "--threads", str(options.threads)]  # fmt: skip
        for name, value in (("--rows", options.rows), ("--experts", options.experts)):
            words += [] if value is None else [name, str(value)]
        return shlex.join([*words, "--case", result.case.name])


def badness(result: CaseResult) -> tuple[int, float]:
    """For ordering results from good to bad."""
    severity = len(SEVERITY) - SEVERITY.index(result.verdict) if result.verdict in SEVERITY else 0
    nmse = result.nmse / NMSE_LIMITS[result.case.op]
    return severity, nmse if nmse == nmse else float("inf")


def available_threads() -> int:
    """As many as this process may use, at most 8; two at least, so that work is divided."""
    if hasattr(os, "sched_getaffinity"):
        return max(2, min(8, len(os.sched_getaffinity(0))))
    return max(2, min(8, os.cpu_count() or 1))


def validate(
    path: Path,
    *,
    library: Path | None = None,
    backends: Sequence[str] = (),
    case: str | None = None,
    rows: int | None = None,
    experts: int | None = None,
    threads: int | None = None,
    timeout: float = 60.0,
    progress: Progress = lambda *_: None,
    report: Report = lambda _: None,
) -> Validation:
    """Runs all cases of the file's expert tensors, or only `case`, on the library's backends.

    `library` is a folder of shared libraries; by default the pinned build's, which is patched if
    the file has expert banks. `backends` keeps the
    devices, backends or buffer types of these names. `rows` and `experts` set how much of each
    tensor is used (0: all); `timeout` is in seconds per case.

    Raises:
        GGUFError: the file is damaged or has no experts.
        UsageError: `case` is none, or none of this file; or expert banks and a stock `library`.
        LlamaCppError: there is no library, or it cannot be loaded.
    """
    file = read_model(path)
    subjects = _subjects(file)
    only = None if case is None else _checked_case(case, file)
    banked = has_banks(file)
    if library is None:
        library = ensure_built(report=report, patched=banked, progress=progress).binaries
    folder = library_folder(library)
    options = WorkerOptions(str(path.absolute()), str(folder.absolute()),
                            threads or available_threads(), rows, experts)  # fmt: skip
    with _Process(options) as process:
        hello = process.hello()
        if banked and not hello["skip"]:
            raise stock_error(path, folder)
        places = tuple(Place(**place) for place in hello["places"])
        chosen, missing = _choose(places, backends)
        cases = [only] if only else list(_cases(subjects, chosen))
        results = tuple(_run(process, cases, timeout, progress))
    return Validation(path, folder, hello["version"], hello["skip"], places, subjects, results,
                      missing, _notes(file, hello["skip"]), options)  # fmt: skip


def _subjects(file: GGUFFile) -> tuple[Subject, ...]:
    if not expert_tensors(file):
        raise GGUFError(f"{file.path} has no expert tensors: there is nothing to validate.")
    tensors = [
        Subject("MUL_MAT_ID", t.name, f"{t.qtype} {'×'.join(map(str, t.shape))}")
        for t in distinct_tensors(file)
    ]
    layers = [Subject("MOE_BRANCH", f"blk.{layer}", _branch_types(file, layer))
              for layer in distinct_layers(file)]  # fmt: skip
    return (*tensors, *layers)


def _branch_types(file: GGUFFile, layer: int) -> str:
    """The types of a layer's branch: gate_up Q4_K, down Q5_0+Q8_0, dense Q4_K."""
    prefix = f"blk.{layer}.ffn_"
    parts = []
    for kind in KINDS:
        found = {t.qtype for name, t in expert_tensors(file).items()
                 if name.startswith(f"{prefix}{kind}_exps.")}  # fmt: skip
        parts += [f"{kind} {'+'.join(sorted(found))}"] if found else []
    dense = [file.tensors[f"{prefix}{kind}.weight"].qtype for kind in ("gate", "up", "down")
             if f"{prefix}{kind}.weight" in file.tensors]  # fmt: skip
    parts += [f"dense {'/'.join(dict.fromkeys(dense))}"] if dense else []
    return ", ".join(parts)


def _notes(file: GGUFFile, skip: bool) -> tuple[str, ...]:
    family = file.metadata.get("general.architecture")
    biased = any(name.endswith("_exps.bias") for name in file.tensors)
    notes = [
        "ADD_ID: not checked, though this file's experts have biases" if biased
        else "ADD_ID: not applicable, these experts have no biases"
    ]  # fmt: skip
    if family not in FAMILIES:
        notes.append(f"MOE_BRANCH: not checked, the branch of {family} is not known here")
    if not skip:
        notes.append("skipped slots: not applicable, this library does not skip negative ids")
    return tuple(notes)


def _checked_case(name: str, file: GGUFFile) -> Case:
    case = parse_case(name)
    known = ([f"blk.{layer}" for layer in _moe_layers(file)] if case.op == OPS[1]
             else list(expert_tensors(file)))  # fmt: skip
    if case.subject not in known:
        raise UsageError(f"{file.path} has no {case.subject} to run {case.op} on.")
    return case


def _moe_layers(file: GGUFFile) -> list[int]:
    if file.metadata.get("general.architecture") not in FAMILIES:
        return []
    return sorted({int(name.split(".")[1]) for name in expert_tensors(file)})


def _choose(
    places: Sequence[Place], wanted: Sequence[str]
) -> tuple[tuple[Place, ...], tuple[str, ...]]:
    """(places of the wanted names, or all; names that none has)"""

    def named(place: Place, name: str) -> bool:
        return name.lower() in {
            n.lower() for n in (place.device, place.backend, place.buffer, place.name)
        }

    chosen = [p for p in places if not wanted or any(named(p, name) for name in wanted)]
    missing = [name for name in wanted if not any(named(p, name) for p in places)]
    return tuple(chosen), tuple(missing)


def _cases(subjects: Sequence[Subject], places: Sequence[Place]) -> Iterator[Case]:
    """Places vary fastest: they share the reference."""
    for subject in subjects:
        for tokens in TOKENS:
            for routing in ROUTINGS:
                if subject.op == "MOE_BRANCH" and routing == "skipped":
                    continue  # a router skips nothing
                for place in places:
                    yield Case(subject.op, subject.name, place.name, tokens, routing)


def _run(
    process: "_Process", cases: Sequence[Case], timeout: float, progress: Progress
) -> Iterator[CaseResult]:
    ends: Counter[tuple[str, str]] = Counter()
    for index, case in enumerate(cases):
        progress("validate", index, len(cases))
        key = (case.subject, case.place)
        if ends[key] >= MOST_ENDS:
            why = f"left out after {MOST_ENDS} cases that aborted or hung"
            yield CaseResult(case, NOT_CHECKED, detail=why)
            continue
        result = process.run(case, timeout)
        ends[key] += result.verdict in (ABORTED, HUNG)
        yield result
    progress("validate", len(cases), len(cases))


class _Process:
    """The process that runs cases, started when it is needed and killed at the end."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._log: IO[bytes] | None = None

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._close_log()

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def hello(self) -> dict[str, Any]:
        """Starts the process; what it says of the library."""
        self._start()
        line = self._answer(STARTUP)
        if line is None:
            raise LlamaCppError(
                f"{self._options.library} could not be loaded within {STARTUP:.0f} s: "
                f"{self._why(self._end())}"
            )
        return self._data(line)

    def run(self, case: Case, timeout: float) -> CaseResult:
        if self._process is None:
            self.hello()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(case.name + "\n")
            self._process.stdin.flush()
            line = self._answer(timeout)
        except BrokenPipeError:
            line = None
        if line is not None:
            return CaseResult(**{**self._data(line), "case": case})
        code = self._end()
        if code is None:
            return CaseResult(case, HUNG, detail=f"no answer within {timeout:g} s")
        return CaseResult(case, ABORTED, detail=self._why(code))

    def _start(self) -> None:
        package = Path(__file__).resolve().parents[2]
        paths = [str(package), os.environ.get("PYTHONPATH", "")]
        environment = {"OMP_WAIT_POLICY": "passive"} | os.environ | ENVIRONMENT
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command = [sys.executable, "-P", "-m", "moequant.validate.worker",
                   json.dumps(asdict(self._options))]  # fmt: skip
        self._close_log()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (kept for what it tells at the end)
        self._lines = queue.SimpleQueue()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            env=environment, text=True, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=_read, args=(self._process, self._lines), daemon=True).start()

    def _answer(self, timeout: float) -> str | None:
        """The next line; None if the process ended or the time is over."""
        try:
            return self._lines.get(timeout=timeout)
        except queue.Empty:
            return None

    def _data(self, line: str) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(line)
        if "error" in data:
            raise LlamaCppError(str(data["error"]))
        return data

    def _end(self) -> int | None:
        """Kills the process; its exit code if it had ended by itself."""
        process, self._process = self._process, None
        if process is None:
            return None
        code = None
        if self._lines_ended(process):
            code = process.wait()
        process.kill()
        process.wait()
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()
        return code

    def _lines_ended(self, process: subprocess.Popen[str]) -> bool:
        """Whether the process is at its end: it is given a moment, after its output ended."""
        try:
            process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _why(self, code: int | None) -> str:
        """The assertion's text, or else how the process ended and its last lines."""
        assert self._log is not None
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        asserted = [line for line in lines if "GGML_ASSERT" in line or "GGML_ABORT" in line]
        if asserted:
            return asserted[-1]
        ended = "it was killed" if code is None else f"exit code {code}"
        return "; ".join([ended, *lines[-LOG_TAIL:]])


def _read(process: subprocess.Popen[str], lines: "queue.SimpleQueue[str | None]") -> None:
    assert process.stdout is not None
    with process.stdout as stdout:
        for line in stdout:
            lines.put(line)
    lines.put(None)
