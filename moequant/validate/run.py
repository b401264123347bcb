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
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from moequant.errors import LlamaCppError, UsageError
from moequant.expert_banks import KINDS, has_banks, stock_error
from moequant.gguf_file import GGUFFile, read_model
from moequant.runtime.build import silent
from moequant.runtime.llama_cpp import Progress, Report, ensure_built
from moequant.validate.cases import (
    ABORTED,
    ADD_ID,
    ERROR,
    FAILED,
    FINDINGS,
    HUNG,
    MOE_BRANCH,
    MUL_MAT_ID,
    NOT_CHECKED,
    PASSED,
    SUBJECT_ROUTINGS,
    TOKENS,
    Case,
    CaseResult,
    Errors,
    parse_case,
)
from moequant.validate.ggml import Place, library_folder
from moequant.validate.weights import (
    FAMILIES,
    bias_tensors,
    check,
    distinct_biases,
    distinct_layers,
    distinct_tensors,
    expert_tensors,
    moe_layers,
)
from moequant.validate.worker import WorkerOptions

STARTUP = 120.0  # seconds until a process must have loaded the library
PREPARE = 900.0  # until it has read a case's weights and made its reference
MEMORY = 0.75  # GiB of weights of a case, unless told otherwise
MOST_ENDS = 2  # aborts and hangs of one subject at one place, after which its rest is left out
LOG_TAIL = 4  # lines of a dead process's log that tell why
# a failed assertion starts a debugger otherwise; and threads that wait by spinning make a busy
# machine four times slower (29 s against 7 s), which OMP_WAIT_POLICY below is for
ENVIRONMENT = {"GGML_NO_BACKTRACE": "1"}
SEVERITY = (HUNG, ABORTED, FAILED)


@dataclass(frozen=True)
class Subject:
    """What cases are about: experts, their biases, or a branch; `what` is its types and shape."""

    op: str
    name: str
    what: str


@dataclass(frozen=True)
class Validation:
    """All results. `missing` are the backends that were asked for and are not there."""

    file: Path
    library: Path
    version: str
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
    def skips(self) -> bool:
        """Whether any device of the library can skip negative ids."""
        return any(place.skips for place in self.places)

    @property
    def passed(self) -> bool:
        """All that was asked for was there, and what was checked is right."""
        errors = any(result.verdict == ERROR for result in self.results)
        return self.checked > 0 and not (self.findings or errors or self.missing)

    @property
    def worst(self) -> CaseResult | None:
        """The case that hangs, or aborts, or is furthest from its limit; None without any."""
        told = [result for result in self.results if result.verdict in (PASSED, *FINDINGS)]
        return max(told, key=badness, default=None)

    def command(self, result: CaseResult) -> str:
        """What repeats exactly this case."""
        options = self.options
        words = ["moequant", "validate", str(self.file), "--library", str(self.library),
                 "--threads", str(options.threads),
                 "--memory", f"{options.memory / 2**30:g}"]  # fmt: skip
        words += [] if options.rows is None else ["--rows", str(options.rows)]
        return shlex.join([*words, "--case", result.case.name])


def badness(result: CaseResult) -> tuple[int, float]:
    """For ordering results from good to bad."""
    severity = len(SEVERITY) - SEVERITY.index(result.verdict) if result.verdict in SEVERITY else 0
    nmse = result.errors.nmse / result.limit
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
    memory: float = MEMORY,
    threads: int | None = None,
    timeout: float = 60.0,
    progress: Progress = silent,
    report: Report = silent,
) -> Validation:
    """Runs all cases of the file's expert tensors, or only `case`, on the library's backends.

    `library` is a folder of shared libraries; by default the pinned build's, which is patched if
    the file has expert banks. `backends` keeps the devices, backends or buffer types of these
    names. `rows` of each expert are compared in MUL_MAT_ID (0: all). `memory`, in GiB, is how much
    of a tensor or layer is used at once. `timeout` is in seconds for a case's computation.

    Raises:
        GGUFError: the file is damaged, has no experts, or lacks what their branch needs.
        UsageError: `case` is none, or none of this file; or expert banks and a stock `library`.
        LlamaCppError: there is no library, or it cannot be loaded.
    """
    file = read_model(path)
    check(file)
    subjects = _subjects(file)
    only = None if case is None else _checked_case(case, file)
    banked = has_banks(file)
    if library is None:
        library = ensure_built(report=report, patched=banked, progress=progress).binaries
    folder = library_folder(library)
    options = WorkerOptions(str(path.absolute()), str(folder.absolute()),
                            threads or available_threads(), rows, int(memory * 2**30))  # fmt: skip
    with _Process(options) as process:
        hello = process.hello()
        places = tuple(Place(**place) for place in hello["places"])
        if banked and not any(place.skips for place in places):
            raise stock_error(path, folder)
        chosen, missing = _choose(places, backends)
        cases = [only] if only else list(_cases(subjects, chosen))
        results = tuple(_run(process, cases, timeout, progress))
    return Validation(path, folder, hello["version"], places, subjects, results, missing,
                      _notes(file, chosen), options)  # fmt: skip


def _subjects(file: GGUFFile) -> tuple[Subject, ...]:
    tensors = [
        Subject(op, t.name, f"{t.qtype} {'×'.join(map(str, t.shape))}")
        for op, found in ((MUL_MAT_ID, distinct_tensors(file)), (ADD_ID, distinct_biases(file)))
        for t in found
    ]
    layers = [Subject(MOE_BRANCH, f"blk.{layer}", _branch_types(file, layer))
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


def _notes(file: GGUFFile, places: Sequence[Place]) -> tuple[str, ...]:
    family = file.metadata.get("general.architecture")
    notes = []
    if not bias_tensors(file):
        notes.append("ADD_ID: not applicable, these experts have no biases")
    if family not in FAMILIES:
        notes.append(f"MOE_BRANCH: not checked, the branch of {family} is not known here")
    for device in dict.fromkeys(place.device for place in places if not place.skips):
        notes.append(f"skipped slots: not applicable, {device} does not skip negative ids here")
    return tuple(notes)


def _checked_case(name: str, file: GGUFFile) -> Case:
    case = parse_case(name)
    known = {
        MUL_MAT_ID: list(expert_tensors(file)),
        ADD_ID: list(bias_tensors(file)),
        MOE_BRANCH: [f"blk.{layer}" for layer in moe_layers(file)],
    }
    if case.subject not in known[case.op]:
        raise UsageError(f"{file.path} has no {case.subject} to run {case.op} on.")
    return case


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
    """Tokens and routings vary fastest: the weights stay where they are."""
    for subject in subjects:
        for place in places:
            for tokens in TOKENS:
                for routing in SUBJECT_ROUTINGS[subject.op]:
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
                f"{self._why(self._end())[1]}"
            )
        return self._data(line)

    def run(self, case: Case, timeout: float) -> CaseResult:
        """What came of it; `timeout` is for the kernels, not for what they are held against."""
        if self._process is None:
            self.hello()
        assert self._process is not None and self._process.stdin is not None
        started = False
        try:
            self._process.stdin.write(case.name + "\n")
            self._process.stdin.flush()
            line = self._answer(PREPARE)
            if started := line is not None and "ready" in self._data(line):
                line = self._answer(timeout)
        except BrokenPipeError:
            line = None
        if line is not None:
            data = self._data(line)
            return CaseResult(**{**data, "case": case, "errors": Errors(**data["errors"])})
        code = self._end()
        if code is None and started:
            return CaseResult(case, HUNG, detail=f"no answer within {timeout:g} s")
        if code is None:
            return CaseResult(case, ERROR, detail=f"not ready within {PREPARE:g} s")
        asserted, why = self._why(code)
        return CaseResult(case, ABORTED if asserted or code < 0 else ERROR, detail=why)

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

    def _why(self, code: int | None) -> tuple[bool, str]:
        """(whether an assertion failed; its text, or how the process ended and its last lines)"""
        assert self._log is not None
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        asserted = [line for line in lines if "GGML_ASSERT" in line or "GGML_ABORT" in line]
        if asserted:
            return True, asserted[-1]
        ended = "it was killed" if code is None else f"exit code {code}"
        if code is not None and code < 0:
            ended = signal.strsignal(-code) or f"signal {-code}"
        return False, "; ".join([ended, *lines[-LOG_TAIL:]])


def _read(process: subprocess.Popen[str], lines: "queue.SimpleQueue[str | None]") -> None:
    assert process.stdout is not None
    with process.stdout as stdout:
        for line in stdout:
            lines.put(line)
    lines.put(None)
