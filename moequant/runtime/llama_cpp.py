"""The llama.cpp that moequant builds: which one is asked for, where it is, and what is in it.

Owns: the layout of the cache, and the one function that gives a built llama.cpp. Leaves out: the
pin (`pin`), source trees (`fetch`), the patches (`patches`), cmake and Ninja (`build`), kernel
checks, and what the tools' output means. Nothing here is needed to export a model.

    <cache>/llama.cpp/<commit>/{source, build-cpu, build-cuda}                 stock
    <cache>/llama.cpp/<commit>/patched-<hash>/{source, build-cpu, build-cuda}  with the patches
    <cache>/llama.cpp/own-<hash>/…                                             a tree of the user's

Beside a build are its record, its log and its lock. All of it may be deleted at any time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moequant.errors import LlamaCppError
from moequant.runtime.build import (
    CMAKE_OPTIONS,
    CUDA_OPTION,
    Build,
    check_programs,
    is_built,
    program,
    run_build,
    silent,
)
from moequant.runtime.fetch import (
    SourceTree,
    ensure_source,
    ensure_tree,
    locked,
    own_tree,
    pinned_tree,
)
from moequant.runtime.patches import Patch, read_series, series_hash
from moequant.runtime.pin import Pin, Progress, Report, cache_directory, patch_folder, read_pin

__all__ = [
    "RUNTIME_TOOLS", "TOOLS", "LlamaCpp", "Patch", "Pin", "Progress", "Report", "cache_directory",
    "ensure_built", "ensure_source", "read_pin",
]  # fmt: skip

TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-bench")
# what `moequant runtime build` makes: with the program that continues a prompt
RUNTIME_TOOLS = (*TOOLS, "llama-completion")
# where others than moequant's own tests build on it: llama.cpp's kernel tests and its server are
# there to be asked for, and the server brings no web page from elsewhere
MORE_OPTIONS = (
    "-DLLAMA_BUILD_TESTS=ON", "-DLLAMA_BUILD_SERVER=ON", "-DLLAMA_USE_PREBUILT_UI=OFF"
)  # fmt: skip


@dataclass(frozen=True)
class LlamaCpp:
    """A llama.cpp that was built: its source tree and the folder of its binaries and libraries."""

    source: Path
    binaries: Path

    def tool(self, name: str) -> Path:
        """Path of a built tool, e.g. `llama-quantize`; LlamaCppError if it was not built."""
        path = self.binaries / program(name)
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


def ensure_built(
    tools: Sequence[str] = TOOLS,
    report: Report = silent,
    *,
    patched: bool = False,
    cuda: bool = False,
    source: Path | None = None,
    jobs: int | None = None,
    progress: Progress = silent,
) -> LlamaCpp:
    """The pinned llama.cpp, or the tree `source`, with `tools` built; instant when they are.

    Args:
        tools: Targets of its cmake that are programs, e.g. `llama-quantize`; of a patched one
            `test-backend-ops` and `llama-server`, too.
        patched: With the series in `llama_cpp_patch/`.
        cuda: With the CUDA backend beside the CPU's.
        source: A llama.cpp source tree of the user's own; it is copied, never written to.
        jobs: How many compilers run at once; None: as many as Ninja chooses.
        progress: Called with ("building", steps done, steps).

    Raises:
        UsageError: `source` is no llama.cpp source tree.
        LlamaCppError: cmake, ninja or a compiler is missing, the source could not be had, a patch
            does not apply, or the build failed (with the last lines of its log and where the rest
            is).
    """
    tree = _tree(patched, source)
    build = Build(tree.source, tree.folder / ("build-cuda" if cuda else "build-cpu"),
                  cmake_options(tree, cuda), jobs)  # fmt: skip
    built = LlamaCpp(tree.source, build.binaries)
    if tree.source.is_dir() and is_built(build, tools):
        return built
    try:
        tree.folder.mkdir(parents=True, exist_ok=True)
        check_programs(build)  # before anything is fetched
        with locked(build.folder.with_suffix(".lock"), report):
            ensure_tree(tree, report)
            if not is_built(build, tools):
                run_build(build, tools, report, progress)
    except OSError as error:
        raise LlamaCppError(f"llama.cpp could not be built in {tree.folder}: {error}") from error
    return built


def _tree(patched: bool, source: Path | None) -> SourceTree:
    series = read_series() if patched else ()
    if patched and not series:
        raise LlamaCppError(f"{patch_folder()} holds no patches: only a stock build can be made.")
    return pinned_tree(series) if source is None else own_tree(source, series)


def cmake_options(tree: SourceTree, cuda: bool) -> tuple[str, ...]:
    """cmake's options; those of the stock pinned build on CPUs are as they ever were."""
    backends = (CUDA_OPTION,) if cuda else ()
    if tree.own is None and not tree.series:
        return (*CMAKE_OPTIONS, *backends)
    names = {option.partition("=")[0] for option in MORE_OPTIONS}
    kept = (option for option in CMAKE_OPTIONS if option.partition("=")[0] not in names)
    version = tree.commit or "unknown"
    if tree.series:
        version += f"-moequant-{series_hash(tree.series)}"
    return (*kept, *MORE_OPTIONS, f"-DLLAMA_BUILD_COMMIT={version}", *backends)
