"""The patched CUDA kernels for MoE, run from their own source on a host emulation of CUDA.

What the emulation is, and what it cannot prove, stands in `tests/cuda_emulation/include/
cuda_runtime.h`; the expected results in `tests/cuda_emulation/checks.py`.
"""

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from moequant.quants import CODECS
from moequant.runtime.fetch import ensure_source, ensure_tree, pinned_tree
from moequant.runtime.patches import read_series
from tests.cuda_emulation.build import ADA, PASCAL, Compiled, emulated
from tests.cuda_emulation.checks import (
    CHECKS,
    FLOATS,
    LAYOUTS,
    RUNS,
    SKIPS,
    IdsCase,
    check_fused,
    check_mm_ids,
    check_products,
    check_quantize,
    experts,
    reason,
    routing,
)
from tests.cuda_emulation.kernels import (
    GEGLU,
    OP,
    SWIGLU,
    SWIGLU_CLAMP,
    SWIGLU_OAI,
    VECTOR_F,
    VECTOR_Q,
    EmulationError,
    Floats,
    Ints,
    Kernels,
)

pytestmark = [
    pytest.mark.skipif(
        shutil.which("g++") is None,
        reason="no g++: the CUDA kernels were NOT run on the emulation",
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulation maps memory as Linux does"),
]

QUANTIZED = tuple(name for name in CODECS if name not in FLOATS)
ROOT = Path(__file__).resolve().parents[2]


COMPILED = {
    # mul_mat_q on dp4a, with one type of each layout of the activations
    "pascal": Compiled(PASCAL, QUANTIZED, ("Q8_0", "Q4_K", "Q2_K"), (8, 16, 32, 64)),
    # mul_mat_q on tensor cores and stream-k, with one type of each kind of product
    "ada": Compiled(
        ADA, ("Q8_0", "Q4_K", "Q3_K", "MXFP4"), ("Q8_0", "Q4_K", "Q2_K", "Q6_K"), (16, 32, 128)
    ),
}
STOCK = Compiled(PASCAL, ("Q4_K",), ("Q4_K",), (32,))
STOCK_SLACK = 4096  # bytes; its mul_mat_q reads behind the memory that it asks for
# tokens, rows and experts that give tiles of each of `Compiled.tiles` columns; the last ones take
# two tiles for an expert
SHAPES = {
    "pascal": ((8, 70, 8), (13, 128, 8), (29, 36, 8), (120, 128, 5)),
    "ada": ((13, 128, 8), (29, 36, 8), (170, 130, 5)),
}


@cache
def library(name: str) -> Kernels:
    return Kernels(emulated(ensure_tree(pinned_tree(read_series())), COMPILED[name]))


@pytest.fixture(params=COMPILED)
def patched(request: pytest.FixtureRequest) -> Kernels:
    """The patched kernels, for one architecture after the other."""
    return library(request.param)


@pytest.fixture(scope="session")
def pascal() -> Kernels:
    return library("pascal")


@pytest.fixture(scope="session")
def stock_library() -> Path:
    return emulated(ensure_source(), STOCK)


@pytest.fixture(scope="session")
def stock(stock_library: Path) -> Kernels:
    """The unpatched kernels."""
    return Kernels(stock_library, STOCK_SLACK)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def activations(rng: np.random.Generator, n_tokens: int, slots: int, cols: int) -> Floats:
    return rng.standard_normal((n_tokens, slots, cols)).astype(np.float32)


def skipped(rng: np.random.Generator, ids: Ints, how: str | None) -> Ints:
    return ids if how is None else SKIPS[how](rng, ids)


# ---- the emulation itself -----------------------------------------------------------------------

FAULTS: dict[str, str | None] = {  # what the error says; None: results differ between the runs
    "no barrier": None,
    "no barrier of the warp": None,
    "ended before a barrier": "barrier divergence: 32 of 64 threads have ended while others wait",
    "two barriers": "barrier divergence: thread",
    "divergent shuffle": "deadlock: 0 of 64 threads have ended",
    "value of an ended lane": "the value of lane 31 is asked for",
    "read behind": "read outside of `in` (256 bytes): byte 256",
    "read before": "read outside of `in` (256 bytes): byte -4",
    "write behind": "written outside of `out` (256 bytes): byte 256",
    "write to an input": "`in`, an input, is written at byte",
    "shared memory, behind": "read outside of `shared values` (256 bytes): byte 256",
    "too much shared memory": "52256 bytes of shared memory, the limit is 49152",
    "unwritten shared memory": None,
    "order of blocks": None,
    "more threads than compiled for": "launched with 64 threads, __launch_bounds__ allows 32",
    "trap": "__trap()",
}


def test_a_right_kernel_runs_on_the_emulation(pascal: Kernels) -> None:
    for run in RUNS:
        assert (pascal.fault(run, 0) == 64).all()


@pytest.mark.parametrize("name", FAULTS)
def test_the_emulation_sees_faults(pascal: Kernels, name: str) -> None:
    number, message = 1 + list(FAULTS).index(name), FAULTS[name]
    results, errors = [], []
    for run in RUNS:
        try:
            results.append(pascal.fault(run, number).tobytes())
        except EmulationError as error:
            errors.append(str(error))
    if message is None:
        assert not errors
        assert len(set(results)) > 1
    else:
        assert any(message in error for error in errors), errors


# ---- mm_ids_helper ------------------------------------------------------------------------------

IDS_CASES = (
    IdsCase(1, 1, 1, 1, False),
    IdsCase(1, 8, 8, 1, True),
    IdsCase(2, 2, 3, 2, False, beyond=1),
    IdsCase(3, 4, 64, 1, True, beyond=60),
    IdsCase(31, 6, 8, 6, False, beyond=2),
    IdsCase(32, 8, 64, 8, False),
    IdsCase(33, 3, 8, 3, False, beyond=5),
    IdsCase(127, 10, 64, 1, False, beyond=54),
    IdsCase(128, 16, 64, 16, False),
    IdsCase(129, 8, 128, 1, True, beyond=120),
    IdsCase(130, 32, 64, 32, False),
    IdsCase(257, 5, 8, 1, True),
    IdsCase(600, 8, 16, 8, False),
    IdsCase(600, 4, 8, 1, True),
)


@pytest.mark.parametrize("how", [None, *SKIPS])
@pytest.mark.parametrize("case", IDS_CASES, ids=str)
def test_mm_ids_helper(
    pascal: Kernels, rng: np.random.Generator, case: IdsCase, how: str | None
) -> None:
    ids = skipped(rng, routing(rng, case.n_tokens, case.n_used, case.n_experts), how)
    check_mm_ids(pascal, case, ids)


def test_mm_ids_helper_of_random_shapes(patched: Kernels, rng: np.random.Generator) -> None:
    for _ in range(25):
        n_experts = int(rng.choice([1, 3, 8, 64]))
        n_used = min(n_experts, int(rng.choice([1, 2, 3, 4, 6, 7, 8, 10, 16, 32])))
        slots_y = int(rng.choice([1, n_used]))
        case = IdsCase(int(rng.integers(1, 200)), n_used, n_experts, slots_y,
                       bool(rng.random() < 0.5), int(rng.integers(0, 9)))  # fmt: skip
        ids = routing(rng, case.n_tokens, n_used, n_experts)
        ids[rng.random(ids.shape) < rng.random()] = -1
        check_mm_ids(patched, case, ids)


# ---- the activations' quantization for MMQ ------------------------------------------------------


@pytest.mark.parametrize("scatter", [False, True], ids=["gather", "scatter"])
@pytest.mark.parametrize("cols", [128, 768])
@pytest.mark.parametrize("qtype", LAYOUTS)
def test_quantization_of_activations(
    pascal: Kernels, rng: np.random.Generator, qtype: str, cols: int, scatter: bool
) -> None:
    x = activations(rng, 11, 1, cols)[:, 0]
    for left in (44, 30, 1, 0):  # slots that are not skipped
        ids = rng.permutation(44).astype(np.int32)
        if scatter:
            ids[ids >= left] = -1
            ids = ids.reshape(11, 4)
        else:
            ids = (ids // 4).astype(np.int32)
            ids[left:] = -1
        check_quantize(pascal, qtype, x, ids, 44, scatter=scatter)


# ---- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", [512, 2048])  # a warp to each row of a block, and a block to a row
@pytest.mark.parametrize(
    ("patched", "qtype"),
    [(name, qtype) for name, compiled in COMPILED.items() for qtype in compiled.types],
    indirect=["patched"],
)
def test_mul_mat_vec_q(patched: Kernels, rng: np.random.Generator, qtype: str, cols: int) -> None:
    matrices = experts(qtype, 8, 12, cols)
    for n_tokens, slots, how in ((1, 1, None), (1, 4, "some"), (1, 1, "all"), (2, 4, "tokens"),
                                 (3, 1, None), (4, 4, "some"), (4, 1, "bank")):  # fmt: skip
        ids = skipped(rng, routing(rng, n_tokens, 4, 8), how)
        y = activations(rng, n_tokens, slots, cols)
        check_products(patched, VECTOR_Q, matrices, y, ids, stride=8 if n_tokens > 1 else None)


@pytest.mark.parametrize("n_tokens", [1, 4])
@pytest.mark.parametrize("qtype", ["Q8_0", "Q4_K", "MXFP4"])
def test_mul_mat_vec_q_clears_no_row_too_many(
    patched: Kernels, rng: np.random.Generator, qtype: str, n_tokens: int
) -> None:
    """The last block of a slot has one row left: more would be behind dst.

    Every slot is skipped: for others mul_mat_vec_q writes such rows, unpatched as well.
    """
    ids = skipped(rng, routing(rng, n_tokens, 4, 8), "all")
    y = activations(rng, n_tokens, 1, 512)
    check_products(patched, VECTOR_Q, experts(qtype, 8, 13, 512), y, ids)


@pytest.mark.parametrize("glu", [None, SWIGLU, GEGLU, SWIGLU_OAI, SWIGLU_CLAMP])
@pytest.mark.parametrize("qtype", ["Q8_0", "Q4_K", "MXFP4"])
def test_mul_mat_vec_q_fused(
    patched: Kernels, rng: np.random.Generator, qtype: str, glu: int | None
) -> None:
    matrices = experts(qtype, 8, 12, 512)
    for n_tokens in (1, 3):
        ids = routing(rng, n_tokens, 4, 8)
        check_fused(patched, rng, VECTOR_Q, matrices, activations(rng, n_tokens, 1, 512), ids, glu)


@pytest.mark.parametrize("cols", [64, 128, 512])  # blocks of one, two and eight warps
@pytest.mark.parametrize("qtype", FLOATS)
def test_mul_mat_vec_f(patched: Kernels, rng: np.random.Generator, qtype: str, cols: int) -> None:
    matrices = experts(qtype, 8, 6, cols)
    for n_tokens, slots, how in ((1, 1, None), (1, 4, "some"), (1, 1, "all"), (2, 4, "tokens"),
                                 (8, 1, "bank"), (5, 4, None)):  # fmt: skip
        ids = skipped(rng, routing(rng, n_tokens, 4, 8), how)
        y = activations(rng, n_tokens, slots, cols)
        check_products(patched, VECTOR_F, matrices, y, ids, stride=8 if n_tokens > 1 else None)


@pytest.mark.parametrize("glu", [None, SWIGLU, GEGLU, SWIGLU_OAI, SWIGLU_CLAMP])
@pytest.mark.parametrize("qtype", FLOATS)
def test_mul_mat_vec_f_fused(
    patched: Kernels, rng: np.random.Generator, qtype: str, glu: int | None
) -> None:
    matrices = experts(qtype, 8, 6, 128)
    check_fused(patched, rng, VECTOR_F, matrices, activations(rng, 1, 1, 128),
                routing(rng, 1, 4, 8), glu)  # fmt: skip


@pytest.mark.parametrize("how", [None, *SKIPS])
@pytest.mark.parametrize("slots", [1, 4])  # the activations scattered to slots, or gathered
@pytest.mark.parametrize(
    ("name", "qtype"),
    [
        *((name, qtype) for name, compiled in COMPILED.items() for qtype in compiled.tile_types),
        *(("pascal", qtype) for qtype in FLOATS),
    ],
)
def test_the_op_with_many_tokens(
    rng: np.random.Generator, name: str, qtype: str, slots: int, how: str | None
) -> None:
    """mul_mat_q for quantized experts, rows sorted by expert for others."""
    cols = 256
    shapes = [(29, 36, 8)] if qtype in FLOATS else SHAPES[name]  # no tiles of columns there
    for n_tokens, rows, n_experts in shapes:
        large = n_tokens > 100
        if large and how in ("all but one", "all"):
            continue  # one row at most: the tiles are those of few tokens
        matrices = experts(qtype, n_experts, rows, cols)
        ids = skipped(rng, routing(rng, n_tokens, 4, n_experts), how)
        y = activations(rng, n_tokens, slots, cols)
        runs = RUNS[1:] if large else RUNS
        check_products(library(name), OP, matrices, y, ids, stride=8, runs=runs)


@pytest.mark.parametrize("how", [None, "some", "tokens", "bank"])
@pytest.mark.parametrize("qtype", COMPILED["ada"].tile_types)
def test_the_op_with_tiles_cut_in_two(
    rng: np.random.Generator, qtype: str, how: str | None
) -> None:
    """stream-k: 8 experts are a tile each, of 4 steps, for 3 multiprocessors.

    The 3rd and the 6th tile are begun by one block and ended by the next; the fixup adds the parts.
    """
    matrices = experts(qtype, 8, 128, 1024)
    ids = skipped(rng, routing(rng, 13, 4, 8), how)
    y = activations(rng, 13, 1, 1024)
    check_products(library("ada"), OP, matrices, y, ids, runs=RUNS[1:])


@pytest.mark.parametrize("skip", [False, True])
def test_the_op_refuses_an_id_that_no_expert_has(
    pascal: Kernels, rng: np.random.Generator, *, skip: bool
) -> None:
    """Where the host sorts the rows: it would be a row of dst that nobody writes."""
    ids = routing(rng, 29, 4, 8)
    ids[:3] = -1 if skip else ids[:3]
    ids[17, 2] = 8
    y = activations(rng, 29, 1, 64)
    with pytest.raises(EmulationError, match=r"GGML_ASSERT\(n_sorted \+ n_skipped == ne_get_rows"):
        pascal.mul_mat_id(RUNS[0], OP, experts("F16", 8, 6, 64), y, ids, skip=skip)


# ---- what may be fused --------------------------------------------------------------------------


@pytest.mark.parametrize(("qtype", "fused"), [("F16", (True, True, False)),
                                              ("Q4_K", (True, False, True))])  # fmt: skip
def test_products_that_may_skip_are_not_fused(qtype: str, fused: tuple[bool, bool, bool]) -> None:
    ada = library("ada")
    assert ada.fuses(RUNS[0], qtype, skip_up=False, skip_gate=False) == fused
    assert ada.fuses(RUNS[0], qtype, skip_up=False, skip_gate=True) == (False, *fused[1:])
    assert ada.fuses(RUNS[0], qtype, skip_up=True, skip_gate=False) == (False, False, False)


# ---- the unpatched kernels ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKS)
def test_the_unpatched_kernels_are_right_without_skipped_slots(stock: Kernels, name: str) -> None:
    assert reason(stock, name, None) is None


def test_the_unpatched_kernels_are_wrong_with_skipped_slots(stock_library: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.cuda_emulation.checks", str(stock_library), str(STOCK_SLACK)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    lines = run.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == list(CHECKS), run.stdout + run.stderr
    assert not [line for line in lines if line.endswith(": right")]


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize(
    ("kernel", "qtype", "n_tokens"),
    [(VECTOR_Q, "Q4_K", 1), (VECTOR_Q, "Q4_K", 4), (VECTOR_F, "F16", 1), (VECTOR_F, "F16", 4),
     (OP, "Q4_K", 29), (OP, "F16", 29)],
)  # fmt: skip
def test_rows_that_are_not_skipped_are_those_of_the_unpatched_kernels(
    pascal: Kernels, stock: Kernels, rng: np.random.Generator, kernel: int, qtype: str,
    n_tokens: int, slots: int,
) -> None:  # fmt: skip
    """Bit by bit."""
    matrices = experts(qtype, 8, 36, 512)
    y = activations(rng, n_tokens, slots, 512)
    ids = routing(rng, n_tokens, 4, 8)
    left = skipped(rng, ids, "some")
    whole = stock.mul_mat_id(RUNS[0], kernel, matrices, y, ids, skip=False)
    part = pascal.mul_mat_id(RUNS[0], kernel, matrices, y, left, skip=True)
    np.testing.assert_array_equal(part[left >= 0], whole[left >= 0])
