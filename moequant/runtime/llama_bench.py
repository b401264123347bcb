"""Runs llama-bench on one file and reads what it measured.

Owns: its options, its JSON, its progress, and stopping it. Leaves out: which llama.cpp that is
(`llama_cpp`), and what the speeds mean (`moequant.bench`).

Source: `tools/llama-bench/llama-bench.cpp`: the fields of a test are `get_fields()`.
"""

import json
import re
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from moequant.errors import LlamaCppError, UsageError

LOG_TAIL = 15  # lines of a failed run's output that the error shows
_STARTED = re.compile(r"benchmark \d+/\d+: (prompt|generation) run \d+/\d+")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BenchOptions:
    """What is measured: `prompt` tokens at once, then `generate` tokens one by one.

    Either may be 0 and is then left out. Both run behind `depth` tokens that are in the context
    already, `repetitions` times. `threads` and `gpu_layers` None: llama-bench's own default.
    """

    prompt: int = 512
    generate: int = 128
    depth: int = 0
    repetitions: int = 5
    threads: int | None = None
    gpu_layers: int | None = None

    @property
    def runs(self) -> int:
        """How many timed runs there are for a file."""
        return self.repetitions * ((self.prompt > 0) + (self.generate > 0))

    @property
    def context(self) -> int:
        """Tokens of the longer test; prompt and generation each start anew, behind `depth`."""
        return self.depth + max(self.prompt, self.generate)

    def arguments(self) -> list[str]:
        """The options of llama-bench."""
        given = {"-p": self.prompt, "-n": self.generate, "-d": self.depth, "-r": self.repetitions,
                 "-t": self.threads, "-ngl": self.gpu_layers}  # fmt: skip
        return [part for name, n in given.items() if n is not None for part in (name, str(n))]


@dataclass(frozen=True)
class Speed:
    """Tokens per second: mean and standard deviation over the runs, and each run."""

    mean: float
    stddev: float
    samples: tuple[float, ...]


@dataclass(frozen=True)
class BenchRun:
    """One file's speeds (None for what was left out), and where they were measured."""

    prompt: Speed | None
    generation: Speed | None
    build_commit: str  # "unknown" for a build outside a git checkout
    build_number: int
    backends: str
    cpu: str
    gpu: str
    threads: int
    gpu_layers: int  # -1: llama-bench's default, all of them
    model_bytes: int  # of all tensors, by llama.cpp's count


def run_llama_bench(
    tool: Path, model: Path, options: BenchOptions, progress: Progress = lambda *_: None
) -> BenchRun:
    """Measure `model` with the llama-bench `tool`.

    `progress("bench", done, total)` is called as runs end. However this is left, by an exception
    too, llama-bench has ended.

    Raises:
        UsageError: nothing to measure, or `tool` cannot be run.
        LlamaCppError: llama-bench failed (with the last lines it wrote), or printed no results.
    """
    if options.runs == 0:
        raise UsageError("--prompt 0 and --generate 0 leave nothing to measure.")
    command = [str(tool), "-m", str(model), *options.arguments(), "-o", "json", "--progress"]
    total = options.runs
    progress("bench", 0, total)
    started = 0

    def line_read(line: str) -> None:
        nonlocal started
        if _STARTED.search(line):
            progress("bench", started, total)
            started += 1

    code, printed, log = _run(command, line_read)
    if code != 0:
        raise LlamaCppError(
            f"{model}: llama-bench {_ending(code)}:\n{_reason(tool, model, options) or log}"
        )
    progress("bench", total, total)
    return _parse(printed, model, tool)


def _run(command: list[str], line_read: Callable[[str], None]) -> tuple[int, str, str]:
    """Exit code, standard output, and the last lines of standard error, each seen as it comes."""
    tail: deque[str] = deque(maxlen=LOG_TAIL)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        process = _start(command, printed)
        try:
            assert process.stderr is not None
            for line in process.stderr:
                tail.append(line.rstrip())
                line_read(line)
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()
        printed.seek(0)
        return code, printed.read(), "\n".join(tail)


def _start(command: list[str], printed: IO[str]) -> "subprocess.Popen[str]":
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.PIPE,
            encoding="utf-8", errors="replace",
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"{command[0]} cannot be run: {error.strerror or error}.") from error


def _ending(code: int) -> str:
    return f"was stopped by signal {-code}" if code < 0 else f"failed with {code}"


def _reason(tool: Path, model: Path, options: BenchOptions) -> str:
    """The end of llama.cpp's own log, which llama-bench shows on request only."""
    quick = replace(options, prompt=1, generate=0, depth=0, repetitions=1)
    command = [str(tool), "-m", str(model), *quick.arguments(), "-o", "json", "-v", "--no-warmup"]
    code, _, log = _run(command, lambda _: None)
    said = [line for line in log.splitlines() if re.search("error|fail", line, re.IGNORECASE)]
    return "\n".join(said) or log if code != 0 else ""


def _parse(printed: str, model: Path, tool: Path) -> BenchRun:
    """The results of a prompt test, a generation test, or both."""
    try:
        tests = json.loads(printed)
        by_kind = {bool(test["n_gen"]): _speed(test) for test in tests}
        first: dict[str, Any] = tests[0]
        return BenchRun(
            prompt=by_kind.get(False),
            generation=by_kind.get(True),
            build_commit=first["build_commit"],
            build_number=first["build_number"],
            backends=first["backends"],
            cpu=first["cpu_info"],
            gpu=first["gpu_info"],
            threads=first["n_threads"],
            gpu_layers=first["n_gpu_layers"],
            model_bytes=first["model_size"],
        )
    except (ValueError, LookupError, TypeError) as error:
        raise LlamaCppError(
            f"{model}: the results of {tool} cannot be read ({type(error).__name__}: {error}), so "
            f"it is probably no llama-bench; it printed:\n{printed[:500] or 'nothing'}"
        ) from error


def _speed(test: dict[str, Any]) -> Speed:
    return Speed(float(test["avg_ts"]), float(test["stddev_ts"]), tuple(test["samples_ts"]))
