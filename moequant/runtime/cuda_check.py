"""Compiles the CUDA files that the series changes, on a machine that needs no GPU.

Owns: which files, the commands, running them one architecture at a time, remembering what compiled.
Leaves out: linking, and everything that only a GPU can show.

Options and architectures are llama.cpp's own: its cmake is configured as `runtime build --cuda`
does it, and what it would run for each file is taken from `compile_commands.json`. Three things
differ. cmake looks for cuBLAS and the driver's library, which are not linked here, so a placeholder
stands for them. Each architecture is compiled by itself, down to the machine code of that GPU:
llama.cpp leaves the last step to the driver for some of them (PTX). And the host's side of a file,
the same for all, is compiled with the first.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moequant.errors import LlamaCppError, UsageError, listing
from moequant.files import replacing
from moequant.runtime.build import (
    NO_GPU_OPTION,
    NVCC_VARIABLES,
    check_run,
    cmake_and_ninja,
    find_nvcc,
    preprocessed,
    run_logged,
    run_nvcc,
    silent,
    tail,
)
from moequant.runtime.cublas import cublas_headers
from moequant.runtime.fetch import SourceTree, ensure_tree, locked, pinned_tree
from moequant.runtime.llama_cpp import cmake_options
from moequant.runtime.patches import Patch, changed_paths, read_series
from moequant.runtime.pin import Report, runtime_directory

CUDA_FOLDER = "ggml/src/ggml-cuda"
# every header that the CUDA backend includes is in one of these, or below the last
_HEADERS = ("ggml/include/*.h", "ggml/src/*.h", f"{CUDA_FOLDER}/**/*.h", f"{CUDA_FOLDER}/**/*.cuh")
_ARCHITECTURE = re.compile(r"--generate-code=arch=compute_(\w+),")
_RELEASE = re.compile(r"release (\d+)\.")


@dataclass(frozen=True)
class Compiled:
    """One file, compiled for one architecture (`86`, `120a`), with the host's side or without it.

    `log` is what nvcc printed: warnings, or nothing. `kept`: an earlier call compiled it.
    """

    file: str
    architecture: str
    host: bool
    seconds: float
    log: str
    kept: bool = False


@dataclass(frozen=True)
class _Step:
    """One file for one architecture: nvcc's command, without its output's name."""

    file: str
    architecture: str
    host: bool
    command: list[str]


@dataclass(frozen=True)
class _Compiler:
    """nvcc, what decides its output beside the command, and cuBLAS's headers where it has none.

    `version` is what nvcc says of itself, the host compiler's version, and their variables.
    """

    nvcc: str
    version: str
    headers: Path | None

    @property
    def includes(self) -> list[str]:
        return [] if self.headers is None else ["-isystem", str(self.headers)]


def check_cuda(
    report: Report = silent,
    *,
    files: Sequence[str] = (),
    architectures: Sequence[str] = (),
    headers: Path | None = None,
) -> list[Compiled]:
    """Compile `files` for `architectures`; at once for what was compiled before.

    Args:
        report: Called with a line per file and architecture.
        files: Names in `ggml/src/ggml-cuda`, e.g. `mmq.cu`; none: those that the series changes.
        architectures: As llama.cpp's list has them, e.g. `86`; none: all of it.
        headers: Folder of cuBLAS's headers; None: nvcc's own, or those of NVIDIA's package.

    Raises:
        UsageError: a file or architecture that llama.cpp does not compile.
        LlamaCppError: nvcc or cmake is missing, the source or the headers could not be had, or
            files did not compile: each with its architecture and the last lines of the log.
    """
    cmake_and_ninja()
    compiler = _compiler(headers, report)
    series = read_series()
    tree = pinned_tree(series)
    ensure_tree(tree, report)
    commands = _commands(tree, compiler, report)
    files = files or _compiled_by_default(changed_files(series, tree.source), commands, report)
    _check_known("file", files, commands)
    known = list(dict.fromkeys(a for name in files for a in _ARCHITECTURE.findall(commands[name])))
    _check_known("architecture", architectures, known)
    chosen = [a for a in known if a in architectures or not architectures]
    steps = [_step(name, commands[name], architecture, architecture == chosen[0], compiler)
             for name in files for architecture in chosen]  # fmt: skip
    return _compile_all(steps, tree.source, compiler, report)


def changed_files(series: Iterable[Patch], source: Path) -> list[str]:
    """The CUDA files that the series changes, or that include a CUDA header which it changes."""
    paths = [Path(path) for patch in series for path in changed_paths(patch)]
    paths = [path for path in paths if path.is_relative_to(CUDA_FOLDER)]
    found = {path.relative_to(CUDA_FOLDER).as_posix() for path in paths if path.suffix == ".cu"}
    changed = [re.escape(path.name) for path in paths if path.suffix == ".cuh"]
    if changed:
        include = re.compile(rf'^\s*#\s*include\s+"(?:[^"]*/)?(?:{"|".join(changed)})"', re.M)
        folder = source / CUDA_FOLDER
        found |= {path.relative_to(folder).as_posix() for path in folder.rglob("*.cu")
                  if include.search(path.read_text("utf-8"))}  # fmt: skip
    return sorted(name for name in found if (source / CUDA_FOLDER / name).is_file())


def _compiled_by_default(
    files: Iterable[str], commands: Iterable[str], report: Report
) -> list[str]:
    known = set(commands)
    for name in sorted(set(files) - known):
        report(f"{name} is not compiled: llama.cpp's default options leave it out")
    return [name for name in files if name in known]


def _compiler(headers: Path | None, report: Report) -> _Compiler:
    nvcc = find_nvcc()
    version = run_nvcc(nvcc, "--version")
    release = _RELEASE.search(version)
    if release is None:
        raise LlamaCppError(f"`{nvcc} --version` names no CUDA release: {version.strip()!r}")
    host = preprocessed(nvcc, "__VERSION__ _MSC_FULL_VER\n")  # the second: cl has no first
    variables = [f"{name}={os.environ.get(name, '')}" for name in NVCC_VARIABLES]
    if headers is None:
        headers = cublas_headers(nvcc, int(release[1]), report)
    return _Compiler(nvcc, "\0".join([version, host, *variables]), headers)


def _commands(tree: SourceTree, compiler: _Compiler, report: Report) -> dict[str, str]:
    """What cmake would run for each file of the CUDA backend, by its name below CUDA_FOLDER."""
    options = [*cmake_options(tree, cuda=True), f"-DCMAKE_CUDA_COMPILER={compiler.nvcc}",
               NO_GPU_OPTION,  # with a GPU, too: all architectures, not only this one's
               "-DGGML_CCACHE=OFF", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]  # fmt: skip
    key = hashlib.sha256("\0".join([compiler.version, *options]).encode()).hexdigest()[:12]
    folder = tree.folder / f"cuda-check-{key}"
    made = folder / "commands.json"
    try:
        with locked(folder.with_suffix(".lock"), report):
            if not made.is_file():
                _configure(tree.source, options, folder, report)
                commands = json.loads((folder / "compile_commands.json").read_text("utf-8"))
                with replacing(made) as temporary:  # last: it says that the rest is whole
                    temporary.write_text(json.dumps(_of_cuda(commands, tree.source)), "utf-8")
        return dict(json.loads(made.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise LlamaCppError(f"{folder} could not be made: {error}") from error


def _configure(source: Path, options: Sequence[str], folder: Path, report: Report) -> None:
    cmake, ninja = cmake_and_ninja()
    if folder.exists():  # of a call that failed: cmake would go by what it remembers of that
        shutil.rmtree(folder)
    folder.mkdir()
    log = folder / "configure.log"
    report(f"asking llama.cpp's cmake for its commands (log: {log})")
    placeholder = folder / "not-linked"
    placeholder.touch()
    command = [cmake, "-S", str(source), "-B", str(folder), "-G", "Ninja",
               f"-DCMAKE_MAKE_PROGRAM={ninja}", *options,
               f"-DCUDA_cublas_LIBRARY={placeholder}",
               f"-DCUDA_cuda_driver_LIBRARY={placeholder}"]  # fmt: skip
    with log.open("w", encoding="utf-8") as file:
        check_run(command, file)


def _of_cuda(commands: Iterable[dict[str, str]], source: Path) -> dict[str, str]:
    folder = source / CUDA_FOLDER
    return {Path(one["file"]).relative_to(folder).as_posix(): one["command"] for one in commands
            if Path(one["file"]).is_relative_to(folder)}  # fmt: skip


def _check_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UsageError(f"llama.cpp compiles no CUDA {what} {', '.join(unknown)}; it has "
                         f"{', '.join(known)}.")  # fmt: skip


def _step(
    file: str, command: str, architecture: str, host: bool, compiler: _Compiler
) -> _Step:  # fmt: skip
    words = [word for word in shlex.split(command) if not word.startswith("--generate-code")]
    output = words.index("-o")
    del words[output : output + 2]
    if not host:
        words[words.index("-c")] = "-cubin"
    code = f"--generate-code=arch=compute_{architecture},code=[sm_{architecture}]"
    return _Step(file, architecture, host, [words[0], code, *compiler.includes, *words[1:]])


def _compile_all(
    steps: Sequence[_Step], source: Path, compiler: _Compiler, report: Report
) -> list[Compiled]:
    """All of them; where a file fails, its other architectures are left out."""
    done: list[Compiled] = []
    failed: dict[str, str] = {}
    key = f"{compiler.version}\0{_headers_hash(source, compiler)}"
    for number, step in enumerate(steps, 1):
        if step.file in failed:
            continue
        what = f"{step.file} for {step.architecture}"
        try:
            one = _compile(step, source, key)
        except LlamaCppError as error:
            failed[step.file] = f"{what}: {error}"
            result = "failed"
        else:
            done.append(one)
            result = f"{one.seconds:.1f} s" + (", compiled before" if one.kept else "")
        report(f"[{number}/{len(steps)}] {what}{' and the host' if step.host else ''}: {result}")
    if failed:
        raise LlamaCppError(f"CUDA files that do not compile with {compiler.nvcc}:"
                            f"{listing(failed.values())}")  # fmt: skip
    return done


def _compile(step: _Step, source: Path, key: str) -> Compiled:
    """The result, kept under what it depends on; LlamaCppError with the log's end."""
    command = shlex.join(step.command).replace(str(source), "")  # the same in another cache
    content = (source / CUDA_FOLDER / step.file).read_bytes()
    digest = hashlib.sha256(f"{key}\0{command}\0".encode() + content).hexdigest()[:32]
    path = runtime_directory() / "cuda-check" / f"{digest}.json"
    before = _kept(path)
    if before is not None:
        return before
    with tempfile.TemporaryDirectory(prefix="moequant-nvcc-") as temporary:
        log = Path(temporary) / "log"
        start = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            code = run_logged([*step.command, "-o", str(Path(temporary) / "out")], file)
        if code != 0:
            raise LlamaCppError(f"nvcc ended with {code}:\n{tail(log)}")
        seconds = round(time.monotonic() - start, 1)
        printed = log.read_text("utf-8", "replace")
    one = Compiled(step.file, step.architecture, step.host, seconds, printed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as target:
        target.write_text(json.dumps(asdict(one)), "utf-8")
    return one


def _kept(path: Path) -> Compiled | None:
    try:
        return Compiled(**{**json.loads(path.read_text("utf-8")), "kept": True})
    except (OSError, ValueError, TypeError):
        return None


def _headers_hash(source: Path, compiler: _Compiler) -> str:
    """sha256 of llama.cpp's headers and of cuBLAS's; the version of nvcc stands for its own."""
    paths = [path for pattern in _HEADERS for path in sorted(source.glob(pattern))]
    if compiler.headers is not None:
        paths += sorted(compiler.headers.glob("*.h"))
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
