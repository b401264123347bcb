"""Compiles the CUDA backend's own source, out of a llama.cpp tree, for the host emulation, once.

Owns: which files, types and shapes of kernel are compiled, the compiler's command, and the cache
(in the user's, keyed by everything that goes in). Leaves out: the rewriting (`translate`), the
functions of the library (`kernels`).
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import filelock

from moequant.runtime.llama_cpp import cache_directory, ensure_built
from tests.cuda_emulation.translate import function, translate, with_cases

FOLDER = Path(__file__).parent
PASCAL, ADA = 610, 890  # dp4a without tensor cores; int8 tensor cores, stream-k
FLAGS = (
    "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-w", "-U_FORTIFY_SOURCE", "-DNDEBUG",
    "-DGGML_CUDA_NO_VMM", "-I.",
)  # fmt: skip
COPIED = ("mmid.cu", "quantize.cu", "mmvq.cu", "mmvf.cu", "mmq.cu", "getrows.cu")
OWN = ("emulation.cpp", "harness.cpp")
# the block of mul_mat_vec_f has this many threads: those for 64, 128 and 512 or more columns
VECTOR_BLOCKS = ("32", "64", "256")
# the op's dispatch, which chooses the kernels and clears the rows that they do not write; and what
# decides whether the op may be fused with others
OP = """
#include <algorithm>
#include <array>

#include "common.cuh"
#include "getrows.cuh"
#include "mmf.cuh"
#include "mmq.cuh"
#include "mmvf.cuh"
#include "mmvq.cuh"
void ggml_cuda_mul_mat(
    ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst);
{functions}
void emu_op_mul_mat_id(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {{
    ggml_cuda_mul_mat_id(ctx, dst);
}}
bool emu_should_fuse(const ggml_tensor * up, const ggml_tensor * gate, const ggml_tensor * glu) {{
    return ggml_cuda_should_fuse_mul_mat(up, gate, glu);
}}
bool emu_should_fuse_vec_f(const ggml_tensor * t) {{ return ggml_cuda_should_fuse_mul_mat_vec_f(t); }}
bool emu_should_fuse_vec_q(const ggml_tensor * t) {{ return ggml_cuda_should_fuse_mul_mat_vec_q(t); }}
"""  # noqa: E501
EXTERN = re.compile(r"^extern DECL_MMQ_CASE\w*\((\w+)\);", re.M)
OP_FUNCTIONS = (
    "ggml_cuda_should_fuse_mul_mat",
    "ggml_cuda_should_fuse_mul_mat_vec_f",
    "ggml_cuda_should_fuse_mul_mat_vec_q",
    "ggml_cuda_mul_mat_id_needs_sync",
    "ggml_cuda_mul_mat_id",
)


@dataclass(frozen=True)
class Compiled:
    """What is compiled of one source tree; each type or tile more costs seconds, once."""

    architecture: int  # __CUDA_ARCH__, and the device's compute capability
    types: tuple[str, ...]  # for mul_mat_vec_q
    tile_types: tuple[str, ...]  # for mul_mat_q
    tiles: tuple[int, ...]  # for mul_mat_q: columns, which it chooses by the number of tokens


def emulated(tree: Path, compiled: Compiled) -> Path:
    """The library of the kernels of the llama.cpp source `tree`, compiled on the first call.

    Its ggml-base is that of the pinned llama.cpp: sizes of types and tensors, the op's constructor.
    """
    compiler = shutil.which("g++")
    assert compiler is not None, "no g++"
    sources = _sources(tree / "ggml" / "src" / "ggml-cuda", compiled)
    headers = [*(tree / "ggml" / "include").glob("*.h"), *(tree / "ggml" / "src").glob("*.h")]
    own = [*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"), *(FOLDER / "include").glob("*.h")]
    base = ensure_built().library("ggml-base")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    flags = (*FLAGS, f"-D__CUDA_ARCH__={compiled.architecture}")
    digest = hashlib.sha256(repr((flags, version, base, sorted(sources.items()))).encode())
    for path in sorted([*headers, *own]):
        digest.update(path.read_bytes())
    root = cache_directory() / "llama.cpp" / "cuda-emulation"
    root.mkdir(parents=True, exist_ok=True)
    library = root / f"{digest.hexdigest()[:16]}.so"
    with filelock.FileLock(library.with_suffix(".lock")):
        if not library.is_file():
            _compile([compiler, *flags], tree / "ggml", sources, base, library)
    return library


def _sources(cuda: Path, compiled: Compiled) -> dict[str, str]:
    """The text of each file to compile or to include, by name."""
    texts = {path.name: path.read_text("utf-8") for path in cuda.glob("*.cuh")
             if not path.name.startswith("fattn")}  # fmt: skip
    texts |= {name: (cuda / name).read_text("utf-8") for name in COPIED}
    texts["vendors/cuda.h"] = (cuda / "vendors" / "cuda.h").read_text("utf-8")
    for name in compiled.tile_types:
        instance = f"mmq-instance-{name.lower()}.cu"
        text = (cuda / "template-instances" / instance).read_text("utf-8")
        texts[instance] = text.replace('"../mmq.cuh"', '"mmq.cuh"')
    texts["faults.cu"] = (FOLDER / "faults.cu").read_text("utf-8")
    backend = (cuda / "ggml-cuda.cu").read_text("utf-8")
    texts["op.cu"] = OP.format(functions="\n".join(function(backend, f) for f in OP_FUNCTIONS))
    types, tile_types = (
        [f"GGML_TYPE_{name}" for name in names] for names in (compiled.types, compiled.tile_types)
    )
    cuts = (
        ("mmvq.cu", "mul_mat_vec_q_switch_type", types),
        ("mmvq.cu", "mul_mat_vec_q_switch_ncols_dst", ["1"]),
        ("mmvf.cu", "mul_mat_vec_f_cuda_switch_ncols_dst", ["1"]),
        ("mmvf.cu", "launch_mul_mat_vec_f_cuda", VECTOR_BLOCKS),
        (
            "mmq.cu",
            "ggml_cuda_mul_mat_q_switch_type",
            [f"GGML_TYPE_{t}" for t in compiled.tile_types],
        ),
        ("mmq.cuh", "mul_mat_q_switch_J", [str(tile) for tile in compiled.tiles]),
    )
    for name, where, keep in cuts:
        texts[name] = with_cases(texts[name], where, keep)
    # every type is declared to be compiled elsewhere
    texts["mmq.cuh"] = EXTERN.sub(lambda m: m[0] if m[1] in tile_types else "", texts["mmq.cuh"])
    return {name: translate(text) for name, text in texts.items()}


def _compile(
    compiler: Sequence[str], ggml: Path, sources: dict[str, str], base: Path, library: Path
) -> None:
    folder = library.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    includes = [
        f"-I{path}" for path in (FOLDER / "include", FOLDER, ggml / "include", ggml / "src")
    ]
    units = [*(FOLDER / name for name in OWN), *(Path(n) for n in sources if n.endswith(".cu"))]

    def object_of(unit: Path) -> str:
        out = f"{unit.stem}.o"
        _run([*compiler, *includes, "-x", "c++", "-c", str(unit), "-o", out], folder)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(object_of, units))
    _run([*compiler, "-shared", "-o", "library.so", *objects, str(base), "-Wl,--no-undefined",
          f"-Wl,-rpath,{base.parent}"], folder)  # fmt: skip
    (folder / "library.so").replace(library)
    shutil.rmtree(folder)


def _run(command: Sequence[str], folder: Path) -> None:
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stderr[-4000:]}"
