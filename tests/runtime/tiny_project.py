"""A cmake project in the form of llama.cpp that is built in a second.

Owns: that tree. Leaves out: everything that llama.cpp does; its programs print a line, and its
`ggml` knows one backend that does not exist. A step waits as long as the file HOLD is there, so
that a build can be met halfway; every run of that step adds a letter to STEPS.
"""

from pathlib import Path

TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-bench", "llama-completion")

_TOP = """
cmake_minimum_required(VERSION 3.14)
project(tiny C)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${{CMAKE_BINARY_DIR}}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${{CMAKE_BINARY_DIR}}/bin)
message(STATUS "commit is ${{LLAMA_BUILD_COMMIT}}")
add_subdirectory(ggml)
add_custom_command(OUTPUT held.c COMMAND sh {tree}.sh ${{CMAKE_BINARY_DIR}}/held.c VERBATIM)
add_library(held SHARED held.c)
foreach(tool {tools} llama-server)
  add_executable(${{tool}} tool.c)
  target_link_libraries(${{tool}} held ggml)
endforeach()
"""
_TOOL = """#include <stdio.h>
int main(void) { puts("stock"); return 0; }
"""
_GGML = """
#include <stddef.h>
static int cpu;
size_t ggml_backend_reg_count(void) { return 1; }
void * ggml_backend_reg_get(size_t i) { return i == 0 ? &cpu : NULL; }
const char * ggml_backend_reg_name(void * reg) { return reg == &cpu ? "Abacus" : "wrong"; }
size_t ggml_backend_reg_dev_count(void * reg) { return 1; }
void * ggml_backend_reg_dev_get(void * reg, size_t i) { return &cpu; }
const char * ggml_backend_dev_name(void * device) { return "ABACUS0"; }
const char * ggml_backend_dev_description(void * device) { return "ten [beads]"; }
void ggml_backend_load_all_from_path(const char * folder) { }
"""
_STEP = """echo x >> {tree}.STEPS
while [ -e {tree}.HOLD ]; do sleep 0.05; done
echo 'int held(void) {{ return 1; }}' > "$1"
"""


def tiny_project(tree: Path) -> Path:
    """Write the tree; HOLD and STEPS are files beside it."""
    (tree / "ggml").mkdir(parents=True)
    (tree / "CMakeLists.txt").write_text(_TOP.format(tree=tree, tools=" ".join(TOOLS)))
    (tree / "tool.c").write_text(_TOOL)
    (tree / "ggml" / "CMakeLists.txt").write_text("add_library(ggml SHARED ggml.c)\n")
    (tree / "ggml" / "ggml.c").write_text(_GGML)
    tree.with_suffix(".sh").write_text(_STEP.format(tree=tree))
    return tree


def hold(tree: Path) -> Path:
    """The file that makes the build wait while it exists."""
    return tree.with_suffix(".HOLD")


def steps(tree: Path) -> int:
    """How often the step ran."""
    path = tree.with_suffix(".STEPS")
    return len(path.read_text().split()) if path.is_file() else 0
