"""`moequant runtime build` and `runtime info`: what they print, and their exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moequant.runtime import patches
from moequant.runtime.backends import ask_backends
from moequant.runtime.info import runtime_info
from moequant.runtime.llama_cpp import LlamaCpp, read_pin
from tests.command_line import run
from tests.runtime.tiny_project import TOOLS, tiny_project

PATCH = """tool: says [patched]

---
--- a/tool.c
+++ b/tool.c
@@ -1,1 +1,2 @@
 #include <stdio.h>
+#include <stddef.h>
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOEQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llama.cpp"


@pytest.fixture
def tree(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    series = tmp_path / "series"
    series.mkdir()
    (series / "0001-tool.patch").write_text(PATCH)
    monkeypatch.setattr(patches, "patch_folder", lambda: series)
    return tiny_project(tmp_path / "tiny")


def test_build_prints_the_folder_of_the_programs(tree: Path, cache: Path) -> None:
    first = run("runtime", "build", "--source", tree, "--jobs", "1", "--tool", "llama-server")
    assert first.exit_code == 0, first.output
    folder = Path(first.stdout.strip())
    assert folder.name == "bin" and folder.parents[1].name.startswith("patched-")
    assert all((folder / tool).is_file() for tool in (*TOOLS, "llama-server"))
    assert "copying" in first.stderr and "building llama-quantize" in first.stderr
    again = run("runtime", "build", "--source", tree)
    assert (again.stdout, again.stderr) == (first.stdout, "")
    stock = run("runtime", "build", "--source", tree, "--stock")
    assert stock.exit_code == 0 and Path(stock.stdout.strip()) != folder


def test_info_tells_what_was_built(tree: Path, cache: Path) -> None:
    assert "nothing was built yet" in run("runtime", "info").stdout
    bins = {run("runtime", "build", "--source", tree, *more).stdout.strip()
            for more in ((), ("--stock",))}  # fmt: skip
    data = json.loads(run("runtime", "info", "--json").stdout)
    assert (data["folder"], data["pin"]["commit"]) == (str(cache), read_pin().commit)
    assert data["patches"] == 1 and data["patch_hash"]
    stock, patched = sorted(data["trees"], key=lambda one: one["patched"])
    assert patched["patches"] == [{"name": "0001-tool.patch", "purpose": "tool: says [patched]"}]
    assert stock["patches"] == [] and data["patch_hash"] in patched["source"]
    for found in (stock, patched):
        assert (found["own"], found["commit"], found["current"]) == (str(tree), None, False)
        source = Path(found["source"])
        assert found["bytes"] == sum(p.stat().st_size for p in source.rglob("*") if p.is_file())
    builds = [stock["builds"][0], patched["builds"][0]]
    assert {build["binaries"] for build in builds} == bins
    for build in builds:
        assert build["finished"] and build["backends_error"] is None
        assert build["tools"] == sorted(TOOLS) and build["libraries"] == ["ggml", "held"]
        assert build["options"]["CMAKE_BUILD_TYPE"] == "Release"
        devices = [{"name": "ABACUS0", "description": "ten [beads]"}]
        assert build["backends"] == [{"name": "Abacus", "devices": devices}]
    text = run("runtime", "info").stdout
    for part in ("unknown commit, stock", "unknown commit, patched", "Abacus (ten [beads])",
                 "0001-tool.patch: tool: says [patched]", "CMAKE_BUILD_TYPE=Release"):  # fmt: skip
        assert part in text


def test_a_library_that_cannot_be_asked_is_no_end_of_info(tree: Path) -> None:
    (tree / "ggml" / "ggml.c").write_text(
        "#include <stdlib.h>\n#include <stddef.h>\nsize_t ggml_backend_reg_count(void) { abort(); }"
    )
    assert run("runtime", "build", "--source", tree, "--stock").exit_code == 0
    result = run("runtime", "info")
    assert result.exit_code == 0 and "not known: libggml.so ended with" in result.stdout
    (build,) = json.loads(run("runtime", "info", "--json").stdout)["trees"][0]["builds"]
    assert build["backends"] is None and "ended with" in build["backends_error"]


def test_the_pinned_library_tells_its_backends(llama_cpp: LlamaCpp) -> None:
    told = ask_backends(llama_cpp.library("ggml"))
    assert isinstance(told, dict), told
    assert told["version"] == read_pin().ggml
    assert [backend["name"] for backend in told["backends"]] == ["CPU"]
    assert told["backends"][0]["devices"][0]["name"] == "CPU"


def test_info_knows_the_pinned_build_of_any_age(llama_cpp: LlamaCpp) -> None:
    (tree,) = [one for one in runtime_info().trees if one.source == llama_cpp.source]
    assert (tree.commit, tree.own, tree.patches, tree.current) == (
        read_pin().commit, None, (), True
    )  # fmt: skip
    (build,) = [one for one in tree.builds if one.folder.name == "build-cpu"]
    assert build.finished and build.options["GGML_CUDA"] == "OFF"
    assert "llama-quantize" in build.tools and "ggml-cpu" in build.libraries


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--source", "{tmp}/nothing"], 2, "is no llama.cpp source tree"),
        (["--jobs", "0"], 2, "--jobs"),
        (["--source", "{tree}", "--tool", "llama-nothing"], 1, "unknown target 'llama-nothing'"),
    ],
)
def test_bad_input_is_one_error(
    tree: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    given = [argument.format(tmp=tmp_path, tree=tree) for argument in arguments]
    result = run("runtime", "build", *given)
    assert result.exit_code == code
    assert message in result.stderr.replace("\n", " ") and "Traceback" not in result.output


def test_a_patch_that_does_not_apply_is_one_error(tree: Path) -> None:
    (tree / "tool.c").write_text("\n")
    result = run("runtime", "build", "--source", tree)
    assert result.exit_code == 1
    assert "Error: 0001-tool.patch does not apply: tool.c, hunk 1 of 1" in result.stderr


def test_info_imports_no_torch(cache: Path) -> None:
    code = "import sys, moequant.runtime.info; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
