"""Building: once, resumed, by one process at a time; one clear error for each thing missing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from moequant.errors import LlamaCppError, UsageError
from moequant.runtime import build as building
from moequant.runtime import fetch, llama_cpp, patches
from moequant.runtime.build import Build, is_built, read_record, run_build
from moequant.runtime.info import runtime_info
from moequant.runtime.llama_cpp import TOOLS, LlamaCpp, ensure_built
from tests.runtime.tiny_project import hold, steps, tiny_project

PATCH = """tool: says patched

Why: so that a test sees it.
---
--- a/tool.c
+++ b/tool.c
@@ -1,2 +1,2 @@
 #include <stdio.h>
-int main(void) { puts("stock"); return 0; }
+int main(void) { puts("patched"); return 0; }
"""
RUN = [sys.executable, "-m", "moequant.cli", "runtime", "build", "--stock", "--source"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOEQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llama.cpp"


@pytest.fixture
def tree(tmp_path: Path, cache: Path) -> Path:
    return tiny_project(tmp_path / "tiny")


@pytest.fixture
def series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one patch that fits the tiny project, in place of moequant's own."""
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "0001-tool.patch").write_text(PATCH)
    monkeypatch.setattr(patches, "patch_folder", lambda: folder)
    return folder


def said(built: LlamaCpp, tool: str = "llama-quantize") -> str:
    return subprocess.run([built.tool(tool)], capture_output=True, text=True, check=True).stdout


def no_command(*_: object) -> int:
    raise AssertionError("a command was run")


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_stock_and_patched_beside_each_other_and_the_second_call_runs_nothing(
    tree: Path, series: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    told: list[tuple[str, int, int]] = []
    stock = ensure_built(source=tree, progress=lambda *step: told.append(step))
    patched = ensure_built(("llama-quantize",), source=tree, patched=True, jobs=1)
    assert (said(stock), said(patched)) == ("stock\n", "patched\n")
    assert {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()} == before
    assert patched.source.parent.parent == stock.source.parent
    stages, done, totals = zip(*told, strict=True)
    assert set(stages) == {"building"} and len(set(totals)) == 1
    assert sorted(done) == list(range(min(done), totals[0] + 1)) and min(done) <= 1
    assert "-DLLAMA_BUILD_COMMIT=unknown-moequant-" in str(
        read_record(patched.binaries.parent.with_suffix(".json"))
    )
    monkeypatch.setattr(building, "run_logged", no_command)
    monkeypatch.setattr(fetch, "_make", no_command)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)  # not even tools are needed
    assert ensure_built(source=tree) == stock
    assert ensure_built(("llama-quantize",), source=tree, patched=True) == patched


def test_another_tool_is_added_and_changed_sources_are_another_tree(tree: Path) -> None:
    first = ensure_built(("llama-bench",), source=tree)
    assert not (first.binaries / "llama-server").exists()
    more = ensure_built(("llama-bench", "llama-server"), source=tree)
    assert more == first and said(more, "llama-server") == "stock\n"
    (tree / "tool.c").write_text((tree / "tool.c").read_text().replace("stock", "mine"))
    (tree / "build").mkdir()  # a build of the user's own is no source
    (tree / "build" / "CMakeCache.txt").write_text("")
    mine = ensure_built(("llama-bench",), source=tree)
    assert mine.source != first.source and not (mine.source / "build").exists()
    assert (said(mine, "llama-bench"), said(first, "llama-bench")) == ("mine\n", "stock\n")


def test_a_patch_that_does_not_fit_leaves_no_source(tree: Path, series: Path, cache: Path) -> None:
    (tree / "tool.c").write_text("\n" + (tree / "tool.c").read_text())
    message = r"0001-tool.patch does not apply: tool.c, hunk 1 of 1 .*line 1 should be '#include"
    with pytest.raises(LlamaCppError, match=message):
        ensure_built(source=tree, patched=True)
    assert not list(cache.rglob("tool.c"))
    assert not list(cache.rglob("partial-*"))


def test_a_changed_series_is_another_build(tree: Path, series: Path) -> None:
    first = ensure_built(("llama-bench",), source=tree, patched=True)
    (series / "0001-tool.patch").write_text(PATCH.replace('"patched"', '"patched again"'))
    second = ensure_built(("llama-bench",), source=tree, patched=True)
    assert said(first, "llama-bench") == "patched\n"
    assert said(second, "llama-bench") == "patched again\n"
    (series / "0001-tool.patch").unlink()
    with pytest.raises(LlamaCppError, match="holds no patches: only a stock build"):
        ensure_built(source=tree, patched=True)


def test_two_processes_at_once_build_once(tree: Path) -> None:
    hold(tree).touch()
    pair = [subprocess.Popen([*RUN, tree], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True) for _ in range(2)]  # fmt: skip
    wait_for(lambda: steps(tree) == 1)
    time.sleep(0.5)  # the other one comes to the lock, or would begin
    hold(tree).unlink()
    answers = [process.communicate(timeout=60) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert steps(tree) == 1
    waited = "waiting for another moequant"
    assert [waited in stderr for _, stderr in answers].count(True) <= 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_never_counts_as_done(
    tree: Path, cache: Path, number: signal.Signals
) -> None:
    hold(tree).touch()
    process = subprocess.Popen([*RUN, tree], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: steps(tree) == 1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any(child.name() == "ninja" for child in children)
    process.send_signal(number)
    process.communicate(timeout=30)
    if number == signal.SIGKILL:  # nobody can clean up after that one
        for child in children:
            with suppress(psutil.NoSuchProcess):  # one that another's end has ended
                child.kill()
    else:
        assert process.returncode == 130
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() for child in children), "the compilers were left running"
    (folder,) = cache.glob("own-*/build-cpu")
    for tool in TOOLS:  # as if it had got that far
        (folder / "bin" / tool).parent.mkdir(exist_ok=True)
        (folder / "bin" / tool).write_text("half a program")
    record = read_record(folder.with_suffix(".json"))
    assert record is not None and record.state == "building"
    (tree_info,) = runtime_info().trees
    assert not tree_info.builds[0].finished
    hold(tree).unlink()
    assert said(ensure_built(source=tree)) == "stock\n"


def test_a_build_of_an_earlier_moequant_counts(tmp_path: Path) -> None:
    build = Build(tmp_path / "source", tmp_path / "build-cpu")
    build.binaries.mkdir(parents=True)
    assert not is_built(build, ("x",))
    (build.binaries / "x").touch()
    assert is_built(build, ("x",)) and not is_built(build, ("x", "y"))
    build.record.write_text(json.dumps({"state": "built", "options": ["-DOTHER=ON"]}))
    assert not is_built(build, ("x",)), "built with other options"
    build.record.write_text("{")
    assert not is_built(build, ("x",))


def test_a_failing_compiler_shows_the_end_of_the_log(tree: Path, cache: Path) -> None:
    (tree / "tool.c").write_text('#error "no such luck"\n')
    with pytest.raises(LlamaCppError, match=r"(?s)ninja.*failed with 1:.*no such luck.*whole log"
                       ) as caught:  # fmt: skip
        ensure_built(source=tree)
    (log,) = cache.glob("own-*/build-cpu.log")
    assert str(log) in str(caught.value)
    assert "commit is unknown" in log.read_text()
    assert len(str(caught.value).splitlines()) <= fetch.LOG_TAIL + 2


def test_what_is_no_llama_cpp_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "CMakeLists.txt").touch()
    with pytest.raises(UsageError, match=r"no llama.cpp source tree: it has no ggml/CMakeLists"):
        ensure_built(source=tmp_path)
    with pytest.raises(UsageError, match=r"has no CMakeLists.txt and no ggml/CMakeLists"):
        ensure_built(source=tmp_path / "nothing")
    assert not cache.exists()


def test_a_tree_that_holds_the_cache_is_not_copied_into_itself(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEQUANT_CACHE", str(tree / "cache"))
    with pytest.raises(UsageError, match=r"tiny holds moequant's cache .*set MOEQUANT_CACHE to"):
        ensure_built(source=tree)
    assert not (tree / "cache").exists()


def test_models_that_are_kept_in_the_tree_are_no_source(tree: Path) -> None:
    before = fetch.own_tree(tree)
    with (tree / "model.gguf").open("wb") as file:
        file.truncate(fetch.LARGEST_SOURCE + 1)
    (tree / "link").symlink_to(tree / "ggml")
    after = fetch.own_tree(tree)
    assert after.folder != before.folder  # by the link, a file like any other
    copy = fetch.ensure_tree(after)
    assert not (copy / "model.gguf").exists()
    assert (copy / "link").readlink() == tree / "ggml"
    (tree / "link").unlink()
    assert fetch.own_tree(tree).folder == before.folder


def test_the_commit_of_a_checkout_is_known(tree: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.run(["git", *identity, "-C", str(tree), *arguments],
                              capture_output=True, text=True, check=True).stdout  # fmt: skip

    assert fetch.own_tree(tree).commit is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    known = fetch.own_tree(tree)
    assert known.commit == git("rev-parse", "--short=9", "HEAD").strip()
    assert not (fetch.ensure_tree(known) / ".git").exists()
    (tree / "tool.c").write_text("")
    assert fetch.own_tree(tree).commit == f"{known.commit}-dirty"


def test_too_little_space_is_said_before_anything_is_copied(
    tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 10**8))
    message = r"building llama.cpp needs about 0.5 GB, and .*own-.* has 0.10 GB free: free some, or"
    with pytest.raises(LlamaCppError, match=message):
        ensure_built(source=tree)
    assert not list(cache.rglob("tool.c"))


def test_a_disk_that_fills_up_leaves_no_source(
    tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise shutil.Error([("a", "b", "[Errno 28] No space left on device")])

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(LlamaCppError, match="source could not be made: .*No space left"):
        ensure_built(source=tree)
    assert not list(cache.rglob("source"))


class Programs:
    """A PATH that holds nothing but programs which write down how they were called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("CC", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.setattr("sys.executable", str(folder.parent / "venv" / "bin" / "python"))

    def add(self, *names: str, folder: Path | None = None) -> None:
        for name in names:
            path = (folder or self.folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'#!/bin/sh\necho "$0 $@" >> "{self.folder}.calls"\n')
            path.chmod(0o755)

    def calls(self) -> list[str]:
        return self.folder.with_suffix(".calls").read_text().splitlines()


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    return Programs(tmp_path / "bin", monkeypatch)


def test_each_missing_program_is_named(
    tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Build(tmp_path, tmp_path / "build-cuda", (building.CUDA_OPTION,))
    message = "cmake and ninja, and neither PATH nor .*/bin has them.* pip install cmake ninja"
    with pytest.raises(LlamaCppError, match=message):
        run_build(build, ["x"])
    programs.add("cmake")
    with pytest.raises(LlamaCppError, match="needs ninja, and neither .* has it.*install ninja"):
        run_build(build, ["x"])
    programs.add("ninja")
    with pytest.raises(LlamaCppError, match=r"needs a C compiler, and PATH has none of cc, gcc"):
        run_build(build, ["x"])
    programs.add("gcc")
    with pytest.raises(LlamaCppError, match=r"needs a C\+\+ compiler, .*g\+\+.*or set CXX to"):
        run_build(build, ["x"])
    programs.add("g++")
    monkeypatch.setattr(building, "CUDA_ROOT", str(tmp_path))
    message = f"for CUDA needs nvcc, .* CUDA_PATH or {tmp_path}: .*set CUDACXX to its nvcc"
    with pytest.raises(LlamaCppError, match=message):
        run_build(build, ["x"])
    assert not build.record.exists() and not build.log.exists()


def test_the_cuda_compiler_is_found_and_asked_for(
    tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs.add("cmake", "ninja", "cc", "c++")
    programs.add("nvcc", folder=tmp_path / "cuda" / "bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(building, "CUDA_BYTES", 0)
    build = Build(tmp_path, tmp_path / "build-cuda", (building.CUDA_OPTION,), jobs=3)
    (build.binaries).mkdir(parents=True)
    (build.binaries / "x").touch()
    lines: list[str] = []
    for gpu in (True, False):
        monkeypatch.setattr(building, "gpu_is_there", lambda gpu=gpu: gpu)
        run_build(build, ["x"], lines.append)
    configured, made, without_gpu, _ = programs.calls()
    options = f"-DGGML_CUDA=ON -DCMAKE_CUDA_COMPILER={tmp_path}/cuda/bin/nvcc"
    assert configured.endswith(options)
    assert without_gpu.endswith(f"{options} -DGGML_NATIVE=OFF"), "cmake would ask a GPU what it is"
    assert ["no NVIDIA GPU here" in line for line in lines] == [False, False, True]
    assert made == f"{programs.folder}/ninja -C {build.folder} -j 3 x"
    assert is_built(build, ["x"]), "the place of nvcc is no part of what was asked for"


def test_a_gpu_is_one_that_the_driver_knows(tmp_path: Path) -> None:
    """With a library in place of the driver's, in a process of its own."""
    code = "from moequant.runtime.build import gpu_is_there; print(gpu_is_there())"
    said = []
    for broken, count in ((0, 1), (0, 0), (100, 1)):
        source = tmp_path / "driver.c"
        source.write_text(f"int cuInit(unsigned f) {{ return {broken}; }}\n"
                          f"int cuDeviceGetCount(int * n) {{ *n = {count}; return 0; }}\n"
                          )  # fmt: skip
        library = tmp_path / "libcuda.so.1"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
        environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
        said.append(subprocess.run([sys.executable, "-c", code], env=environment, check=True,
                                   capture_output=True, text=True).stdout.strip())  # fmt: skip
    assert said == ["True", "False", "False"]


def test_build_tools_beside_this_python_are_used(tmp_path: Path, programs: Programs) -> None:
    """As in a venv that is not activated, where ninja is not on cmake's PATH either."""
    beside = tmp_path / "venv" / "bin"
    programs.add("cc", "c++")
    programs.add("cmake", "ninja", folder=beside)
    build = Build(tmp_path / "source", tmp_path / "build-cpu")
    with pytest.raises(LlamaCppError, match=r"build-cpu/bin has no x: this is another llama.cpp"):
        run_build(build, ["x"])
    configured, made = programs.calls()
    assert configured.startswith(f"{beside}/cmake -S {tmp_path}/source")
    assert f"-DCMAKE_MAKE_PROGRAM={beside}/ninja" in configured
    assert made == f"{beside}/ninja -C {build.folder} x"


def test_the_pinned_stock_build_stays_what_it_was() -> None:
    """Other versions of moequant share it: its folder and options are no one's to change."""
    tree = fetch.pinned_tree()
    assert tree.source.parts[-3:] == ("llama.cpp", llama_cpp.read_pin().commit, "source")
    assert llama_cpp.cmake_options(tree, cuda=False) == building.CMAKE_OPTIONS
    assert llama_cpp.cmake_options(tree, cuda=True) == (*building.CMAKE_OPTIONS, "-DGGML_CUDA=ON")


def test_more_can_be_built_of_a_patched_one(series: Path) -> None:
    options = llama_cpp.cmake_options(fetch.pinned_tree(patches.read_series()), cuda=True)
    names = [option.partition("=")[0] for option in options]
    assert len(set(names)) == len(names), "an option is given twice"
    assert {"-DLLAMA_BUILD_TESTS=ON", "-DLLAMA_BUILD_SERVER=ON"} < set(options)
