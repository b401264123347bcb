"""Builds a llama.cpp source tree with cmake and Ninja.

Owns: the options, which programs that needs, the log, progress, stopping it, and the record that
says whether a build is whole. Leaves out: where the source comes from (`fetch`) and which folder is
whose (`llama_cpp`).

The record is a file beside the build folder. It says `building` from before the first command until
everything that was asked for is there, so that a build that was killed never counts as done; the
next call goes on from what Ninja finds.
"""

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from moequant.errors import LlamaCppError
from moequant.files import replacing
from moequant.runtime.fetch import LOG_TAIL, check_space
from moequant.runtime.pin import Progress, Report

CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
CUDA_OPTION = "-DGGML_CUDA=ON"
# llama.cpp compiles for the GPUs that are there, and cmake fails where there is none; with this it
# compiles for its own list of architectures (and, for the CPU, for AVX2 and not for this machine)
NO_GPU_OPTION = "-DGGML_NATIVE=OFF"
CUDA_ROOT = "/usr/local/cuda"  # where NVIDIA's installers put it
# what nvcc and cmake take options and the host compiler from, beside the command line
NVCC_VARIABLES = (
    "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "CUDAFLAGS", "CUDAHOSTCXX"
)  # fmt: skip
# what cmake says where a part of the toolkit is not installed: what to do
_CUDA_PARTS = {
    "CUDA::cublas": "cuBLAS's development files are not installed beside nvcc; they come with "
    "NVIDIA's toolkit (Debian, Ubuntu: libcublas-dev-VERSION).",
    "CUDA::cuda_driver": "libcuda.so is not installed, nor its stub, which comes with NVIDIA's "
    "toolkit (Debian, Ubuntu: cuda-driver-dev-VERSION).",
}
# of free disk: a CPU build was 0.05 GB with four tools (a server needs more); CUDA, not measured
# here, compiles every kernel for several architectures
CPU_BYTES = 500_000_000
CUDA_BYTES = 5_000_000_000
_STEP = re.compile(r"\[(\d+)/(\d+)\] ")  # ninja's status, as NINJA_STATUS below asks for
_COMPILERS = {"CC": ("cc", "gcc", "clang", "cl"), "CXX": ("c++", "g++", "clang++", "cl")}
_STOP_SECONDS = 10.0


def silent(*_: Any) -> None:
    """A progress callback, or a report, that shows nothing."""


@dataclass(frozen=True)
class Build:
    """One build of one source tree: its folder, cmake's options, and how many jobs Ninja runs.

    `jobs` None: as many as Ninja chooses.
    """

    source: Path
    folder: Path
    options: tuple[str, ...] = CMAKE_OPTIONS
    jobs: int | None = None

    @property
    def binaries(self) -> Path:
        """Where llama.cpp's cmake puts programs and libraries."""
        return self.folder / "bin"

    @property
    def record(self) -> Path:
        """The file that says whether the build is whole."""
        return self.folder.with_suffix(".json")

    @property
    def log(self) -> Path:
        """What cmake and Ninja printed the last time."""
        return self.folder.with_suffix(".log")

    @property
    def cuda(self) -> bool:
        """Whether the CUDA backend is part of it."""
        return CUDA_OPTION in self.options


@dataclass(frozen=True)
class Record:
    """What a build folder is: `state` `building` or `built`, with these options of cmake."""

    state: str
    options: tuple[str, ...]


def read_record(path: Path) -> Record | None:
    """The record; None where there is none. What cannot be read counts as `building`."""
    try:
        data = json.loads(path.read_text("utf-8"))
        return Record(str(data["state"]), tuple(data["options"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        return Record("building", ())


def is_built(build: Build, tools: Sequence[str]) -> bool:
    """Whether all `tools` are there, of a build that was finished with the same options.

    A build without a record is one of an earlier moequant, which kept none.
    """
    record = read_record(build.record)
    if record is not None and record != Record("built", build.options):
        return False
    return all((build.binaries / program(tool)).is_file() for tool in tools)


def program(tool: str) -> str:
    """The file name of a program on this platform."""
    return f"{tool}.exe" if os.name == "nt" else tool


def check_programs(build: Build) -> Build:
    """`build`, with the options that say where its programs are.

    Raises:
        LlamaCppError: cmake, ninja, a C or C++ compiler or, for CUDA, nvcc is missing, or the disk
            has too little space.
    """
    cmake_and_ninja()
    _check_compilers()
    if build.cuda:
        build = replace(build, options=(*build.options, f"-DCMAKE_CUDA_COMPILER={find_nvcc()}",
                                        *([] if gpu_is_there() else [NO_GPU_OPTION])))  # fmt: skip
    check_space(build.folder.parent, CUDA_BYTES if build.cuda else CPU_BYTES, "building llama.cpp")
    return build


def run_build(
    build: Build, tools: Sequence[str], report: Report = silent, progress: Progress = silent
) -> None:
    """Configure and build `tools`; what is there already is not built again.

    Raises:
        LlamaCppError: as `check_programs`, or a command failed: the last lines of its log and
            where the rest is.
    """
    given = build.options
    build = check_programs(build)
    cmake, ninja = cmake_and_ninja()
    report(f"building {', '.join(tools)} (some minutes, once; log: {build.log})")
    if NO_GPU_OPTION in build.options:
        report("no NVIDIA GPU here: compiling for all architectures that llama.cpp compiles for by "
               "default, and for any CPU with AVX2")  # fmt: skip
    _write_record(build.record, Record("building", given))
    configure = [cmake, "-S", str(build.source), "-B", str(build.folder), "-G", "Ninja",
                 f"-DCMAKE_MAKE_PROGRAM={ninja}", *build.options]  # fmt: skip
    jobs = [] if build.jobs is None else ["-j", str(build.jobs)]
    with build.log.open("w", encoding="utf-8") as log:
        for command in (configure, [ninja, "-C", str(build.folder), *jobs, *tools]):
            check_run(command, log, progress)
    missing = [tool for tool in tools if not (build.binaries / program(tool)).is_file()]
    if missing:
        raise LlamaCppError(f"{build.source} was built, but {build.binaries} has no "
                            f"{', '.join(missing)}: this is another llama.cpp than "
                            "moequant knows.")  # fmt: skip
    _write_record(build.record, Record("built", given))


def cmake_and_ninja() -> tuple[str, str]:
    """Absolute paths of cmake and ninja, from PATH or from beside this Python (a venv's own)."""
    beside = str(Path(sys.executable).parent) if sys.executable else ""
    found = {
        name: shutil.which(name) or (shutil.which(name, path=beside) if beside else None)
        for name in ("cmake", "ninja")
    }
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise LlamaCppError(
            f"building llama.cpp needs {' and '.join(missing)}, and neither PATH nor "
            f"{beside or 'this Python'} has {'them' if len(missing) > 1 else 'it'}: install with "
            f"`{sys.executable or 'python'} -m pip install {' '.join(missing)}` or your system's "
            "packages."
        )
    cmake, ninja = (str(Path(path).absolute()) for path in found.values() if path)
    return cmake, ninja


def _check_compilers() -> None:
    for variable, names in _COMPILERS.items():
        chosen = os.environ.get(variable)
        if chosen is None and not any(map(shutil.which, names)):
            language = "C" if variable == "CC" else "C++"
            raise LlamaCppError(
                f"building llama.cpp needs a {language} compiler, and PATH has none of "
                f"{', '.join(names)}: install one (Debian: `apt install g++`; macOS: "
                f"`xcode-select --install`), or set {variable} to yours."
            )


def find_nvcc() -> str:
    """Path of nvcc: CUDACXX, or the one on PATH, in CUDA_HOME or CUDA_PATH, or the usual place.

    Raises:
        LlamaCppError: there is none.
    """
    chosen = os.environ.get("CUDACXX")
    nvcc = shutil.which(chosen or "nvcc")
    roots = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), CUDA_ROOT)
    for root in filter(None, () if chosen else roots):
        nvcc = nvcc or shutil.which("nvcc", path=str(Path(root) / "bin"))
    if nvcc is None:
        where = (f"CUDACXX is {chosen}, which is no program" if chosen else
                 f"it is neither on PATH nor in CUDA_HOME, CUDA_PATH or {CUDA_ROOT}")  # fmt: skip
        raise LlamaCppError(f"compiling for CUDA needs nvcc, and {where}: install NVIDIA's CUDA "
                            "toolkit, or set CUDACXX to its nvcc.")  # fmt: skip
    return nvcc


def run_nvcc(nvcc: str, *arguments: str) -> str:
    """What nvcc prints to stdout.

    Raises:
        LlamaCppError: it cannot be executed, or failed: the last lines it printed.
    """
    try:
        result = subprocess.run([nvcc, *arguments], capture_output=True, text=True,
                                encoding="utf-8", errors="replace", check=False)  # fmt: skip
    except OSError as error:
        raise LlamaCppError(f"{nvcc} cannot be executed ({error.strerror}): set CUDACXX to an nvcc "
                            "of this machine.") from error  # fmt: skip
    if result.returncode != 0:
        last = "\n".join((result.stderr or result.stdout).strip().splitlines()[-LOG_TAIL:])
        given = [f"{name}={os.environ[name]}" for name in NVCC_VARIABLES if name in os.environ]
        raise LlamaCppError(f"`{nvcc} {arguments[0]} …` failed with {result.returncode}:\n"
                            f"{last}\nSet CUDACXX to an nvcc that works here, and CUDAHOSTCXX to a "
                            "C++ compiler that it takes; set now: "
                            f"{', '.join(given) or 'no variable of nvcc'}.")  # fmt: skip
    return result.stdout


def preprocessed(nvcc: str, text: str) -> str:
    """The last line that nvcc and its host compiler make of a CUDA file with this text.

    Raises:
        LlamaCppError: they make nothing of it; see `run_nvcc`.
    """
    host = os.environ.get("CUDAHOSTCXX")  # of cmake: nvcc itself does not read it
    with tempfile.TemporaryDirectory(prefix="moequant-nvcc-") as temporary:
        path = Path(temporary) / "probe.cu"
        path.write_text(text, "utf-8")
        out = run_nvcc(nvcc, "-E", *(("-ccbin", host) if host else ()), str(path))
    return out.rstrip().rpartition("\n")[2]


def gpu_is_there() -> bool:
    """Whether NVIDIA's driver is on this machine and knows of a GPU."""
    count = ctypes.c_int(0)
    for name in ("libcuda.so.1", "nvcuda.dll"):
        with suppress(OSError, AttributeError):
            driver = ctypes.CDLL(name)
            if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
                break
    return count.value > 0


def check_run(command: Sequence[str], log: IO[str], progress: Progress = silent) -> None:
    """Run the command; its output goes to the file `log`, Ninja's steps to `progress`.

    Raises:
        LlamaCppError: it failed: the last lines of the log, where the rest is, and what to do
            about it where that is known.
    """
    code = run_logged(command, log, progress)
    if code != 0:
        last = tail(Path(log.name))
        known = [f"\n{remedy}" for part, remedy in _CUDA_PARTS.items() if part in last]
        raise LlamaCppError(f"`{' '.join(command[:3])} …` failed with {code}:\n{last}\nThe whole "
                            f"log is {log.name}.{''.join(known)}")  # fmt: skip


def run_logged(command: Sequence[str], log: IO[str], progress: Progress = silent) -> int:
    """The command's exit code; its output goes to `log`, Ninja's steps to `progress`.

    Whatever ends this early, Ctrl-C among it, ends the command and what it started.
    """
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        env=environment, text=True, encoding="utf-8", errors="replace", start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            log.write(line)
            log.flush()
            step = _STEP.match(line)
            if step:
                progress("building", int(step[1]), int(step[2]))
        return process.wait()
    finally:
        if process.poll() is None:
            _stop(process)
        process.stdout.close()


def _stop(process: "subprocess.Popen[str]") -> None:
    """End the process and its group; Ninja passes it on to its compilers."""
    for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        with suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, number)
            else:
                process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
            return


def tail(log: Path) -> str:
    """The last lines of a log, as an error shows them."""
    with log.open(encoding="utf-8", errors="replace") as file:
        return "".join(deque(file, LOG_TAIL)).rstrip()


def _write_record(path: Path, record: Record) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"state": record.state, "options": record.options}),
                             "utf-8")  # fmt: skip
