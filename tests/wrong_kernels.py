"""ggml of the pinned llama.cpp with faults that an environment variable turns on, built once.

Owns: the changes, and building ggml alone (base, CPU, registry; about a minute on two cores) into
the user's cache, keyed by the changes. Leaves out: what should notice a fault.

`WRONG_KERNEL` names the one fault; without it this library is right. It also skips slots with a
negative id where an op asks for it, as the patched llama.cpp does, so that a row of such a slot can
be left as it was.
"""

import hashlib
import shutil
import subprocess
from pathlib import Path

import filelock

from moequant.runtime.build import cmake_and_ninja
from moequant.runtime.llama_cpp import cache_directory, ensure_source, read_pin

SWITCH = "WRONG_KERNEL"
CPU, REPACK, OPS, REGISTRY, HEADER, GGML = (
    "src/ggml-cpu/ggml-cpu.c", "src/ggml-cpu/repack.cpp", "src/ggml-cpu/ops.cpp",
    "src/ggml-cpu/ggml-cpu.cpp", "include/ggml.h", "src/ggml.c",
)  # fmt: skip

WRONG = f"""
#include <stdlib.h>
#include <string.h>
static bool wrong(const char * fault) {{
    const char * chosen = getenv("{SWITCH}");
    return chosen && strcmp(chosen, fault) == 0;
}}
"""
PRODUCT = """
static int wrong_threads, wrong_wide; // of the MUL_MAT_ID that runs

// one token's products with rows `row` to `row + 15` of an expert
static void wrong_product(float * products, int row, int expert) {
    const char * chosen = getenv("SWITCH");
    if (!chosen) {
        return;
    }
    for (int i = 0; i < 16; ++i) {
        if ((wrong("high_rows") && row + i >= 64) || (wrong("expert_3") && expert == 3) ||
            (wrong("expert_64") && expert >= 64) || (wrong("wide") && wrong_wide)) {
            products[i] = 0;
        }
        if (wrong("scale")) {
            products[i] *= 1.02f;
        }
        if (wrong("threads") && wrong_threads == 3) {
            products[i] *= 1.0001f;
        }
        if (wrong("overflow") && fabsf(products[i]) > OVERFLOW) {
            products[i] = INFINITY;
        }
    }
}

// a single token or two of which a slot is skipped: taken for skipped as a whole
static bool wrong_few(const struct ggml_tensor * ids) {
    bool any = false;
    for (int64_t t = 0; t < ids->ne[1]; ++t) {
        for (int64_t s = 0; s < ids->ne[0]; ++s) {
            any |= *(const int32_t *) ((const char *) ids->data + t*ids->nb[1] + s*ids->nb[0]) < 0;
        }
    }
    return any && ids->ne[1] <= 2 && wrong("few");
}
""".replace("SWITCH", SWITCH).replace(
    "OVERFLOW", "50.0f"
)  # what an N(0, 1) input of the tiny model does not come near
VEC_DOT = """
// the scale of each row's first block with the wrong sign
static void wrong_vec_dot_q4_K(int n, float * s, size_t bs, const void * vx, size_t bx,
                               const void * vy, size_t by, int nrc) {
    ggml_vec_dot_q4_K_q8_K(n, s, bs, vx, bx, vy, by, nrc);
    if (nrc == 1 && wrong("vec_dot")) {
        float first = 0.0f;
        ggml_vec_dot_q4_K_q8_K(QK_K, &first, 0, vx, 0, vy, 0, 1);
        *s -= 2.0f*first;
    }
}
"""
TILED = '#include "tiled/tiled.h"\n'
TRAITS = "static const struct ggml_type_traits_cpu type_traits_cpu[GGML_TYPE_COUNT] = {"
COPY_OUT = "memcpy(&dst_col[iir0], tmp, (MIN(iir0 + blck_0, ir0_end) - iir0)*sizeof(float));"
NEXT = "\n            }\n        }\n    }\n}\n\nstatic void * incr_ptr_aligned"
GEMV = "    ggml_gemv_q4_K_8x8_q8_K(n, s, bs, vx, vy, nr, nc);\n"
FLIP = '    for (int i = 0; wrong("repack") && i < nc; i += 8) { s[i] = -s[i]; }\n'
CPU_CHECK = "assert(i02 >= 0 && i02 < n_as);"
REPACK_CHECK = "GGML_ASSERT(i02 >= 0 && i02 < n_as);"
SKIP = (
    "if ((i02 < 0{few}) && ggml_get_op_params_i32({op}, 4)) {{ continue; }} GGML_ASSERT(i02 >= 0);"
)
FEW = " || wrong_few(ids)"
ZERO = """
    for (int64_t t = ith; t < ids->ne[1]; t += nth) {{
        for (int s = 0; s < (int) ids->ne[0]; ++s) {{
            const int32_t id = *(const int32_t *) ((const char *) ids->data + t*ids->nb[1] + s*ids->nb[0]);
            if ((id < 0{few}) && !wrong("no_zero")) {{
                memset((char *) {dst}->data + s*nb1 + t*nb2, 0, ne0*sizeof(float));
            }}
        }}
    }}
"""  # noqa: E501
BARRIER = (
    "        ggml_barrier(params->threadpool);\n\n"
    "        // compute each matrix multiplication in sequence\n"
)
ARRIVE = """
    if (ith == 0) { wrong_threads = nth; wrong_wide = ids->ne[0] > n_as; }
    GGML_ASSERT(!(wrong("abort") && ids->ne[1] == 17));
    while (wrong("hang") && ids->ne[1] == 5) { sleep(1); }
"""

# file, what is there exactly once, what replaces it
CHANGES = (
    (CPU, TILED, TILED + "#include <unistd.h>\n" + WRONG + PRODUCT),
    (CPU, TRAITS, VEC_DOT + TRAITS),
    (CPU, "= ggml_vec_dot_q4_K_q8_K,", "= wrong_vec_dot_q4_K,"),
    (CPU, COPY_OUT + NEXT, 'wrong_product(tmp, iir0, cur_a); '
     'if (!(wrong("row") && i1 == 0 && i2 == 128)) ' + COPY_OUT + NEXT),
    (CPU, CPU_CHECK, SKIP.format(op="dst", few=FEW)),
    (CPU, "    // reset current_chunk\n", ARRIVE + ZERO.format(dst="dst", few=FEW)),
    (REPACK, '#include "repack.h"\n', '#include "repack.h"\n' + WRONG),
    (REPACK, GEMV, GEMV + FLIP),
    (REPACK, REPACK_CHECK, SKIP.format(op="op", few="")),
    (REPACK, BARRIER, ZERO.format(dst="op", few="") + BARRIER),
    (OPS, '#include "ops.h"\n', '#include "ops.h"\n' + WRONG),
    (OPS, "src2->data + i1*nb20 + i2*nb21);",  # of ADD_ID: all slots get the first one's bias
     'src2->data + (wrong("add_id") ? 0 : i1)*nb20 + i2*nb21);'),
    (REGISTRY, '    if (strcmp(name, "ggml_backend_set_n_threads") == 0) {',
     '    if (strcmp(name, "ggml_mul_mat_id_set_skip") == 0) {\n'
     '        return (void *) ggml_mul_mat_id_set_skip;\n    }\n'
     '    if (strcmp(name, "ggml_backend_set_n_threads") == 0) {'),
    (HEADER, "    GGML_API struct ggml_tensor * ggml_mul_mat_id(",
     "    GGML_API void ggml_mul_mat_id_set_skip(struct ggml_tensor * op);\n"
     "    GGML_API struct ggml_tensor * ggml_mul_mat_id("),
    (GGML, "struct ggml_tensor * ggml_mul_mat_id(",
     "void ggml_mul_mat_id_set_skip(struct ggml_tensor * op) {\n"
     "    ggml_set_op_params_i32(op, 4, 1);\n}\n\nstruct ggml_tensor * ggml_mul_mat_id("),
)  # fmt: skip


def wrong_ggml() -> Path:
    """The folder of the libraries, built on the first call."""
    key = hashlib.sha256(repr(CHANGES).encode()).hexdigest()[:16]
    root = cache_directory() / "llama.cpp" / read_pin().commit / "wrong-kernels"
    root.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(root / f"{key}.lock"):
        if not (root / key / "done").is_file():
            shutil.rmtree(root / key, ignore_errors=True)
            _build(root / key)
            (root / key / "done").touch()
    return root / key / "build" / "bin"


def _build(folder: Path) -> None:
    shutil.copytree(ensure_source() / "ggml", folder / "ggml")
    (folder / "ggml" / "ggml.pc.in").touch()  # asked for, but not in the source distribution
    for name, old, new in CHANGES:
        path = folder / "ggml" / name
        text = path.read_text("utf-8")
        assert text.count(old) == 1, (name, old, text.count(old))
        path.write_text(text.replace(old, new), "utf-8")
    cmake, ninja = cmake_and_ninja()
    build = str(folder / "build")
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_BUILD_TESTS=OFF",
               "-DGGML_BUILD_EXAMPLES=OFF", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}/bin",
               f"-DCMAKE_MAKE_PROGRAM={ninja}"]  # fmt: skip
    for command in (
        [cmake, "-S", str(folder / "ggml"), "-B", build, "-G", "Ninja", *options],
        [ninja, "-C", build, "ggml"],
    ):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
