"""`runtime cuda-check`: which files, what is compiled again, errors; and nvcc itself on one file.

Most tests have a stub for nvcc, and a tiny project whose cmake writes commands as llama.cpp's does.
"""

import hashlib
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest

from moequant.errors import LlamaCppError
from moequant.runtime import build, cublas, cuda_check
from moequant.runtime.cuda_check import CUDA_FOLDER, changed_files, check_cuda
from moequant.runtime.fetch import ensure_source, ensure_tree, own_tree
from moequant.runtime.patches import Patch, read_series
from tests.command_line import run

_NVCC = """#!/bin/sh
if [ "$1" = --version ]; then cat "$0.version"; exit; fi
if [ "$1" = -E ]; then cat "$0.host"; exit; fi
echo "$@" >> "$0.calls"
while [ $# -gt 1 ]; do
  case "$1" in *.cu) source=$1;; -o) output=$2;; esac
  shift
done
grep WARN "$source" >&2
if grep BROKEN "$source" >&2; then exit 2; fi
touch "$output"
"""
_CMAKE = """cmake_minimum_required(VERSION 3.14)
project(tiny NONE)
if(NOT EXISTS "${CUDA_cublas_LIBRARY}" OR GGML_NATIVE OR NOT GGML_CUDA)
  message(FATAL_ERROR "Target links to: CUDA::cublas but the target was not found")
endif()
foreach(name a b c)
  list(APPEND commands "{
    \\"file\\": \\"${CMAKE_SOURCE_DIR}/ggml/src/ggml-cuda/${name}.cu\\",
    \\"command\\": \\"${CMAKE_CUDA_COMPILER} -O3 -DX=\\\\\\\\\\\\\\"x y\\\\\\\\\\\\\\" \\
--generate-code=arch=compute_80,code=[compute_80] --generate-code=arch=compute_86,code=[sm_86] \\
-x cu -c ${CMAKE_SOURCE_DIR}/ggml/src/ggml-cuda/${name}.cu -o ${name}.o\\"}")
endforeach()
list(JOIN commands "," commands)
file(WRITE ${CMAKE_BINARY_DIR}/compile_commands.json "[${commands}]")
"""
_VERSION = "Cuda compilation tools, release 13.0, V13.0.88\n"
_HOST = '# 1 "probe.cu"\n"12.2.0" _MSC_FULL_VER\n'
# of cuBLAS, what the header does that every CUDA file includes
_CUBLAS = """#pragma once
#define CUBLAS_VER_MAJOR 13
#define CUBLAS_TF32_TENSOR_OP_MATH 3
typedef int cublasStatus_t;
typedef struct cublasContext * cublasHandle_t;
static const cublasStatus_t CUBLAS_STATUS_SUCCESS = 0;
const char * cublasGetStatusString(cublasStatus_t);
cublasStatus_t cublasCreate(cublasHandle_t *);
cublasStatus_t cublasDestroy(cublasHandle_t);
cublasStatus_t cublasSetMathMode(cublasHandle_t, int);
cublasStatus_t cublasSetWorkspace(cublasHandle_t, void *, size_t);
"""


class Tiny:
    """A source tree in the cache with files a.cu, b.cu and c.cu, and a stub for nvcc."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MOEQUANT_CACHE", str(folder / "cache"))
        given = folder / "tiny"
        (given / CUDA_FOLDER).mkdir(parents=True)
        (given / "CMakeLists.txt").write_text(_CMAKE)
        (given / "ggml" / "CMakeLists.txt").write_text("")
        for name in ("a.cu", "b.cu", "c.cu", "a.cuh"):
            (given / CUDA_FOLDER / name).write_text('#include "a.cuh"\n' if name == "c.cu" else "")
        self.tree = own_tree(given)
        ensure_tree(self.tree)
        monkeypatch.setattr(cuda_check, "pinned_tree", lambda _: self.tree)
        monkeypatch.setattr(cuda_check, "read_series", lambda: SERIES)
        self.nvcc = folder / "nvcc"
        self.nvcc.write_text(_NVCC)
        self.nvcc.chmod(0o755)
        self.version(_VERSION)
        self.host(_HOST)
        monkeypatch.setenv("CUDACXX", str(self.nvcc))
        self.headers = folder / "headers"
        self.headers.mkdir()
        (self.headers / "cublas_v2.h").write_text(_CUBLAS)
        monkeypatch.setattr(cuda_check, "cublas_headers", lambda *_: self.headers)

    def version(self, text: str) -> None:
        self.nvcc.with_suffix(".version").write_text(text)

    def host(self, text: str) -> None:
        """What the host compiler makes of the file that asks for its version."""
        self.nvcc.with_suffix(".host").write_text(text)

    def write(self, name: str, text: str) -> None:
        (self.tree.source / CUDA_FOLDER / name).write_text(text)

    def compiled(self) -> list[str]:
        """What nvcc was run for since the last call: file and architecture."""
        log = self.nvcc.with_suffix(".calls")
        lines = log.read_text().splitlines() if log.is_file() else []
        log.unlink(missing_ok=True)
        return [f"{Path(word).name} {line.partition('code=[')[2].partition(']')[0]}"
                for line in lines for word in line.split() if word.endswith(".cu")]  # fmt: skip


def changes(name: str) -> Patch:
    path = f"{CUDA_FOLDER}/{name}"
    return Patch(
        f"0001-{name}.patch", f"why\n---\n--- a/{path}\n+++ b/{path}\n@@ -1 +1 @@\n-x\n+y\n"
    )


SERIES = (changes("b.cu"), changes("a.cuh"))
ALL = ["b.cu sm_80", "b.cu sm_86", "c.cu sm_80", "c.cu sm_86"]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    return Tiny(tmp_path, monkeypatch)


def test_changed_files_and_those_that_include_a_changed_header(tmp_path: Path) -> None:
    folder = tmp_path / CUDA_FOLDER
    (folder / "more").mkdir(parents=True)
    texts = {"a.cu": '#include "a.cuh"', "b.cu": '#include "x-a.cuh"', "c.cu": "",
             "more/d.cu": '# include "../a.cuh"', "e.cu": "// a.cuh"}  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    series = [changes("c.cu"), changes("a.cuh"), changes("removed.cu")]
    assert changed_files(series, tmp_path) == ["a.cu", "c.cu", "more/d.cu"]


def test_the_series_changes_the_kernels_of_mul_mat_id() -> None:
    found = changed_files(read_series(), ensure_source())
    assert {"ggml-cuda.cu", "mmid.cu", "mmq.cu", "mmvf.cu", "mmvq.cu", "quantize.cu"} <= set(found)


def test_every_architecture_by_itself_with_the_options_of_cmake(tiny: Tiny) -> None:
    check_cuda(files=["a.cu"])
    first, second = tiny.nvcc.with_suffix(".calls").read_text().splitlines()
    path = f"{tiny.tree.source}/{CUDA_FOLDER}/a.cu"
    options = f'-isystem {tiny.headers} -O3 -DX="x y" -x cu'
    code = "--generate-code=arch=compute_{0},code=[sm_{0}]"
    assert first.startswith(f"{code.format(80)} {options} -c {path} -o ")
    assert second.startswith(f"{code.format(86)} {options} -cubin {path} -o ")


def test_a_second_call_compiles_nothing_and_a_change_what_it_concerns(tiny: Tiny) -> None:
    lines: list[str] = []
    assert [one.kept for one in check_cuda(lines.append)] == [False] * 4
    assert tiny.compiled() == ALL
    assert "[1/4] b.cu for 80 and the host: " in lines[-4] and "[4/4] c.cu for 86: " in lines[-1]
    again = check_cuda(lines.append)
    assert [one.kept for one in again] == [True] * 4 and tiny.compiled() == []
    assert "compiled before" in lines[-1]
    tiny.write("c.cu", '#include "a.cuh"\n// changed')
    check_cuda()
    assert tiny.compiled() == ALL[2:]
    for change in (
        lambda: tiny.write("a.cuh", "// changed"),
        lambda: (tiny.headers / "cublas_v2.h").write_text("// changed"),
        lambda: tiny.version(_VERSION + "another\n"),
    ):
        change()
        check_cuda()
        assert tiny.compiled() == ALL


@pytest.mark.parametrize("changed", ["host", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS",
                                     "NVCC_CCBIN", "CUDAFLAGS", "CUDAHOSTCXX"])  # fmt: skip
def test_another_host_compiler_or_variable_asks_cmake_and_compiles_again(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    check_cuda(files=["b.cu"], architectures=["86"])
    if changed == "host":
        tiny.host(_HOST.replace("12.2.0", "13.1.0"))
    else:
        monkeypatch.setenv(changed, "another")
    lines: list[str] = []
    (one,) = check_cuda(lines.append, files=["b.cu"], architectures=["86"])
    assert not one.kept and "asking llama.cpp's cmake" in lines[0]


def test_a_damaged_record_is_compiled_again(tiny: Tiny, tmp_path: Path) -> None:
    check_cuda(files=["b.cu"], architectures=["86"])
    (record,) = (tmp_path / "cache" / "llama.cpp" / "cuda-check").glob("*.json")
    record.write_text("{}")
    tiny.compiled()
    check_cuda(files=["b.cu"], architectures=["86"])
    assert tiny.compiled() == ["b.cu sm_86"]


def test_the_command_prints_seconds_warnings_and_json(tiny: Tiny) -> None:
    tiny.write("c.cu", '#include "a.cuh"\nc.cu(1): WARNing: [odd]\n')
    result = run("runtime", "cuda-check")
    assert result.exit_code == 0, result.output
    assert "sm_80" in result.stdout and "b.cu" in result.stdout
    assert "c.cu for 86:\nc.cu(1): WARNing: [odd]" in result.stdout
    assert "4 compiled, 0 of them by an earlier call; nvcc warned in 2" in result.stdout
    chosen = ("--file", "a.cu", "--architecture", "86")
    (one,) = json.loads(run("runtime", "cuda-check", "--json", *chosen).stdout)
    assert (one["file"], one["architecture"], one["log"]) == ("a.cu", "86", "")
    assert "no warnings" in run("runtime", "cuda-check", *chosen).stdout


def test_all_files_that_fail_are_named_with_the_end_of_the_log(tiny: Tiny) -> None:
    tiny.write("b.cu", "b.cu(1): error: BROKEN\n")
    result = run("runtime", "cuda-check")
    assert result.exit_code == 1
    assert f"do not compile with {tiny.nvcc}:" in result.stderr
    assert "b.cu for 80: nvcc ended with 2:\nb.cu(1): error: BROKEN" in result.stderr
    assert "[1/4] b.cu for 80 and the host: failed" in result.stderr
    assert tiny.compiled() == ["b.cu sm_80", *ALL[2:]]
    run("runtime", "cuda-check")
    assert tiny.compiled() == ["b.cu sm_80"], "what failed is not kept"


@pytest.mark.parametrize(("option", "name", "known"), [
    ("--file", "x.cu", "CUDA file x.cu; it has a.cu, b.cu, c.cu"),
    ("--architecture", "50", "CUDA architecture 50; it has 80, 86"),
])  # fmt: skip
def test_unknown_names_are_refused(tiny: Tiny, option: str, name: str, known: str) -> None:
    result = run("runtime", "cuda-check", option, name)
    assert result.exit_code == 2 and known in result.stderr and tiny.compiled() == []


def test_without_nvcc_or_with_something_else_of_that_name(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny.version("no such thing\n")
    result = run("runtime", "cuda-check")
    assert result.exit_code == 1 and "names no CUDA release: 'no such thing'" in result.stderr
    tiny.nvcc.write_bytes(b"\x7fELF of another machine")
    result = run("runtime", "cuda-check")
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert f"{tiny.nvcc} cannot be executed (Exec format error): set CUDACXX" in result.stderr
    monkeypatch.setenv("CUDACXX", str(tmp_path / "none"))
    message = f"needs nvcc, and CUDACXX is {tmp_path}/none, which is no program"
    assert message in run("runtime", "cuda-check").stderr
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build, "CUDA_ROOT", str(tmp_path))
    monkeypatch.setattr(cuda_check, "cmake_and_ninja", lambda: ("cmake", "ninja"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    result = run("runtime", "cuda-check")
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert "needs nvcc, and it is neither on PATH nor in CUDA_HOME, CUDA_PATH or" in result.stderr


def test_a_cmake_that_fails_leaves_nothing_to_go_by(tiny: Tiny) -> None:
    path = tiny.tree.source / "CMakeLists.txt"
    check_cuda(files=["a.cu"])
    for folder in tiny.tree.folder.glob("cuda-check-*/"):
        shutil.rmtree(folder)
    fails = _CMAKE.replace("NOT EXISTS", "EXISTS")
    path.write_text(fails.replace("  message(", "  set(FOUND no CACHE INTERNAL x)\n  message("))
    message = "(?s)cmake -S .*failed with 1:.*CUDA::cublas.*cuBLAS's development files are not"
    with pytest.raises(LlamaCppError, match=message):
        check_cuda()
    remembers = 'if(DEFINED FOUND)\n  message(FATAL_ERROR "remembered")\nendif()\n'
    path.write_text(_CMAKE + remembers)
    assert len(check_cuda()) == 4


class Index:
    """A folder that pip takes packages from, with one wheel in it that holds cuBLAS's headers."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MOEQUANT_CACHE", str(folder / "cache"))
        (folder / "index").mkdir()
        name = f"nvidia_cublas-{cublas.VERSION}"
        wheel = folder / "index" / f"{name}-py3-none-manylinux_2_27_x86_64.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("nvidia/cu13/include/cublas_v2.h", _CUBLAS)
            archive.writestr("nvidia/cu13/lib/libcublas.so.13", "large")
            info = f"{name}.dist-info"
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: nvidia-cublas\n"
                                                 f"Version: {cublas.VERSION}\n")  # fmt: skip
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        self.sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
        monkeypatch.setattr(cublas, "WHEEL_BYTES", 0)
        self.nvcc = folder / "nvcc"
        self.nvcc.write_text("#!/bin/sh\n")  # of the file that asks for them, nothing is left
        self.nvcc.chmod(0o755)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    return Index(tmp_path, monkeypatch)


def test_headers_come_from_the_package_once_and_nothing_else_is_kept(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cublas, "SHA256", index.sha256)
    lines: list[str] = []
    folder = cublas.cublas_headers(str(index.nvcc), 13, lines.append)
    assert folder is not None and len(lines) == 1
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [
        ("cublas_v2.h", _CUBLAS)
    ]
    assert not list(folder.parent.rglob("*.whl"))
    assert cublas.cublas_headers(str(index.nvcc), 13, lines.append) == folder and len(lines) == 1


def test_another_package_than_the_pinned_is_refused(index: Index) -> None:
    with pytest.raises(LlamaCppError, match="another sha256 than the pinned ee8722.*tampered"):
        cublas.cublas_headers(str(index.nvcc), 13, lambda _: None)
    with pytest.raises(LlamaCppError, match="is of CUDA 12 and comes without cublas_v2.h"):
        cublas.cublas_headers(str(index.nvcc), 12, lambda _: None)


def test_headers_of_the_toolkit_are_preferred(index: Index) -> None:
    index.nvcc.write_text("#!/bin/sh\necho found\n")
    assert cublas.cublas_headers(str(index.nvcc), 12, lambda _: None) is None


def test_an_nvcc_that_fails_is_not_one_without_headers(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.nvcc.write_text("#!/bin/sh\necho g++: No such file or directory >&2\nexit 3\n")
    for name in build.NVCC_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NVCC_CCBIN", "g++")
    message = r"(?s)nvcc -E …` failed with 3:\ng\+\+: No such file.*set now: NVCC_CCBIN=g\+\+"
    for cuda in (12, 13):
        with pytest.raises(LlamaCppError, match=message):
            cublas.cublas_headers(str(index.nvcc), cuda, lambda _: None)


def test_nvcc_itself_is_asked_for_headers_and_host_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        nvcc = build.find_nvcc()
    except LlamaCppError as error:
        pytest.skip(f"nvcc was not asked: {error}")
    assert build.preprocessed(nvcc, "#if __has_include(<cublas_v3.h>)\nfound\n#endif\n") != "found"
    assert re.match(r'"[^"]*\d+\.', build.preprocessed(nvcc, "__VERSION__\n"))
    (tmp_path / "cublas_v2.h").write_text(_CUBLAS)
    monkeypatch.setenv("NVCC_APPEND_FLAGS", f"-I{tmp_path}")
    assert cublas.cublas_headers(nvcc, 12, lambda _: None) is None
    monkeypatch.setenv("CUDAHOSTCXX", f"{tmp_path}/g++")
    with pytest.raises(LlamaCppError, match=f"(?s)failed with .*CUDAHOSTCXX={tmp_path}"):
        cublas.cublas_headers(nvcc, 12, lambda _: None)


def test_mmid_compiles_with_nvcc_for_one_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patched file with llama.cpp's own options. cuBLAS's headers are a few lines here, what
    `common.cuh` uses of them, since NVIDIA's come in 423 MB; `make cuda-check` has those."""
    try:
        build.find_nvcc()
    except LlamaCppError as error:
        pytest.skip(f"no CUDA file was compiled: {error}")
    monkeypatch.setattr(cuda_check, "runtime_directory", lambda: tmp_path)  # nothing compiled yet
    (tmp_path / "cublas_v2.h").write_text(_CUBLAS)
    with pytest.raises(
        LlamaCppError, match=r'(?s)mmid.cu for 86: .*"cublasSetStream" is undefined'
    ):
        check_cuda(files=["mmid.cu"], architectures=["86"], headers=tmp_path)
    with (tmp_path / "cublas_v2.h").open("a") as file:
        file.write("cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t);\n")
    for kept in (False, True):
        (one,) = check_cuda(files=["mmid.cu"], architectures=["86"], headers=tmp_path)
        assert (one.file, one.architecture, one.host, one.kept) == ("mmid.cu", "86", True, kept)
        assert "warning" not in one.log
