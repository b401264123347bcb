"""What each MoE kernel must give, by brute force, for given ids; each check fails by an exception.

Owns: routings, the expected results in numpy, the checks of one kernel each. Leaves out: which
cases are run (`../llama_cpp_patch/test_cuda_emulation.py`).

`python -m tests.cuda_emulation.checks LIBRARY SLACK [CHECK …]` runs them with skipped slots, each
in a process of its own, which a wild write may end, and prints a line for each.

Every case runs under several orders of threads and two poisons, and must give the same bytes: what
depends on unwritten memory, or on a missing barrier, differs.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from moequant.quants import quantize
from tests.cuda_emulation.kernels import (
    GEGLU,
    OP,
    SWIGLU,
    SWIGLU_CLAMP,
    SWIGLU_OAI,
    VECTOR_F,
    VECTOR_Q,
    EmulationError,
    Experts,
    Floats,
    Ints,
    Kernels,
    Run,
)

POISON = 0x7F7F7F7F
RUNS = (Run(0, POISON), Run(1, 0xFFFFFFFF), Run(2, POISON))
NMSE = 5e-4  # ggml's own limit for products
FUSED_NMSE = 5e-3  # ggml's own, where a GLU multiplies two products
ENOUGH_ROWS = 8  # of one activation each: the error of one is that of its quantization
FLOATS = ("F32", "F16", "BF16")
# block_q8_1_mmq has a scale for each 32 or 64 values, and sums of each 32 or 16 (mmq.cuh)
LAYOUTS = {"Q8_0": "D4", "Q4_K": "DS4", "Q2_K": "D2S6"}


# ---- routings -----------------------------------------------------------------------------------


def routing(rng: np.random.Generator, n_tokens: int, n_used: int, n_experts: int) -> Ints:
    """Different experts for each token."""
    order = rng.random((n_tokens, n_experts)).argsort(axis=1)
    return order[:, :n_used].astype(np.int32)


def some(rng: np.random.Generator, ids: Ints) -> Ints:
    """Four of ten slots."""
    return np.where(rng.random(ids.shape) < 0.4, -1, ids).astype(np.int32)


def tokens(rng: np.random.Generator, ids: Ints) -> Ints:
    """All slots of half of the tokens, the first and the last of them."""
    out = ids.copy()
    out[rng.random(len(ids)) < 0.5] = -1
    out[[0, -1]] = -1
    return out


def bank(rng: np.random.Generator, ids: Ints) -> Ints:
    """Experts with odd numbers are in another bank; the map numbers the rest anew."""
    return np.where(ids % 2 == 1, -1, ids // 2).astype(np.int32)


def all_but_one(rng: np.random.Generator, ids: Ints) -> Ints:
    """One slot is left."""
    out = np.full_like(ids, -1)
    out.flat[ids.size // 2] = ids.flat[ids.size // 2]
    return out


def every(rng: np.random.Generator, ids: Ints) -> Ints:
    return np.full_like(ids, -1)


SKIPS: dict[str, Callable[[np.random.Generator, Ints], Ints]] = {
    "some": some, "tokens": tokens, "bank": bank, "all but one": all_but_one, "all": every,
}  # fmt: skip


# ---- mm_ids_helper ------------------------------------------------------------------------------


@dataclass(frozen=True)
class IdsCase:
    n_tokens: int
    n_used: int
    n_experts: int
    slots_y: int  # rows of src1 for each token
    inverse: bool
    beyond: int = 0  # ids between the rows


def check_mm_ids(kernels: Kernels, case: IdsCase, ids: Ints) -> None:
    """Each slot that is not skipped once, under its expert, in order; nothing else is written."""
    used = np.flatnonzero(ids.reshape(-1) >= 0)
    order = used[np.argsort(ids.reshape(-1)[used], kind="stable")]
    bounds = np.searchsorted(ids.reshape(-1)[order], np.arange(case.n_experts + 1))
    token, slot = order // case.n_used, order % case.n_used
    for run in RUNS:
        blank = np.full(ids.size, run.poison, np.uint32).view(np.int32)
        dst, src1 = blank.copy(), blank.copy()
        dst[: len(order)] = order
        if case.inverse:
            src1[order] = np.arange(len(order))
        else:
            src1[: len(order)] = token * case.slots_y + slot % case.slots_y
        got = kernels.mm_ids(run, ids, case.n_experts, case.slots_y, case.slots_y, case.inverse,
                             case.n_used + case.beyond)  # fmt: skip
        for name, values, expected in zip(
            ("ids_src1", "ids_dst", "expert_bounds"), got, (src1, dst, bounds), strict=True
        ):
            np.testing.assert_array_equal(values, expected, f"{name}, {case}, {run}")


# ---- the quantization for MMQ -------------------------------------------------------------------


def check_quantize(
    kernels: Kernels, qtype: str, x: Floats, ids: Ints, rows: int, *, scatter: bool
) -> None:
    """The row of each id at its place, quantized; rows without an id are not written.

    ids: [rows], row of x for each compact row; with scatter [len(x), n_used], compact row for each
    slot of a token. Negative: none.
    """
    source = np.full(rows, -1)
    if scatter:
        for token, compact in enumerate(ids):
            source[compact[compact >= 0]] = token
    else:
        source = ids
    first = None
    for run in RUNS:
        blocks = kernels.quantize_mmq(run, qtype, x, ids, rows, scatter=scatter)
        blank = np.frombuffer(np.uint32(run.poison).tobytes() * (blocks.shape[2] // 4), np.uint8)
        assert (blocks[:, source < 0] == blank).all(), f"a row without an id is written, {run}"
        kept = blocks[:, source >= 0]
        first = kept if first is None else first
        np.testing.assert_array_equal(kept, first, f"another order, other bytes: {run}")
        _check_blocks(LAYOUTS[qtype], kept, x[source[source >= 0]])


def _check_blocks(layout: str, blocks: npt.NDArray[np.uint8], x: Floats) -> None:
    """blocks [cols/128, n, 144] are x [n, cols], zeros behind its columns."""
    padded = np.zeros((len(x), len(blocks) * 128), np.float32)
    padded[:, : x.shape[1]] = x
    values = padded.reshape(len(x), len(blocks), 128).transpose(1, 0, 2)
    head, quants = blocks[..., :16], blocks[..., 16:].view(np.int8).astype(np.float64)
    sums: Any = None
    if layout == "D4":
        scales = head.view(np.float32)
    elif layout == "DS4":
        pairs = head.view(np.float16)
        scales, sums, each = pairs[..., 0::2], pairs[..., 1::2], 32
    else:
        pairs = head.view(np.float16)
        scales, sums, each = pairs[..., :2], pairs[..., 2:], 16
    step = np.repeat(scales.astype(np.float64), 128 // scales.shape[-1], axis=-1)
    error = np.abs(quants * step - values)
    assert (error <= 0.51 * step + np.abs(values) * 2e-3).all(), "wrong quants or scales"
    if sums is not None:
        count = min(sums.shape[-1], 128 // each)
        expected = values.reshape(*values.shape[:2], 128 // each, each).sum(axis=-1)[..., :count]
        np.testing.assert_allclose(sums[..., :count], expected, rtol=2e-3, atol=2e-2)


# ---- the products -------------------------------------------------------------------------------


@cache
def experts(qtype: str, n_experts: int, rows: int, cols: int, seed: int = 3) -> Experts:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((n_experts * rows, cols)).astype(np.float32)
    shape = (n_experts, rows, -1)
    if qtype == "F32":
        return Experts(qtype, weights.view(np.uint8).reshape(shape), weights.reshape(shape))
    data = quantize(torch.from_numpy(weights), qtype, compiled=False).numpy()
    values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[qtype]).astype(np.float32)
    return Experts(qtype, data.reshape(shape), values.reshape(shape))


def product(
    matrices: Experts, bias: Floats | None, y: Floats, ids: Ints
) -> npt.NDArray[np.float64]:
    out = np.zeros((*ids.shape, matrices.values.shape[1]))
    for token, slot in np.argwhere(ids >= 0):
        expert = ids[token, slot]
        out[token, slot] = matrices.values[expert].astype(np.float64) @ y[token, slot % y.shape[1]]
        if bias is not None:
            out[token, slot] += bias[expert]
    return out


def check_products(
    kernels: Kernels, kernel: int, matrices: Experts, y: Floats, ids: Ints,
    stride: int | None = None, runs: Sequence[Run] = RUNS,
) -> None:  # fmt: skip
    """Rows near the product with the dequantized expert; a skipped slot's row is zero."""
    expected = product(matrices, None, y, ids)
    skip = bool((ids < 0).any())
    run_all(
        lambda run: kernels.mul_mat_id(run, kernel, matrices, y, ids, skip=skip, stride=stride),
        expected, ids, NMSE, runs,
    )  # fmt: skip


def run_all(
    call: Callable[[Run], Floats], expected: npt.NDArray[np.float64], ids: Ints, limit: float,
    runs: Sequence[Run],
) -> None:  # fmt: skip
    """Every row for itself, loosely: that it is the right one; and all together within `limit`."""
    first = None
    for run in runs:
        got = call(run)
        assert (got[ids < 0].view(np.uint32) == 0).all(), f"a skipped row is not zero, {run}"
        error = ((got.astype(np.float64) - expected) ** 2).sum(axis=-1)
        energy = (expected**2).sum(axis=-1)
        for token, slot in np.argwhere(ids >= 0):
            nmse = error[token, slot] / energy[token, slot]
            assert nmse <= 20 * limit, f"row {token}, {slot}: NMSE {nmse}, {run}"
        if (ids >= 0).sum() >= ENOUGH_ROWS:
            assert error.sum() <= limit * energy.sum(), f"NMSE {error.sum() / energy.sum()}, {run}"
        first = got if first is None else first
        np.testing.assert_array_equal(got, first, f"another order, another result: {run}")


def silu(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return x / (1 + np.exp(-x))


def glu(kind: int, gate: Any, up: Any, limit: float) -> npt.NDArray[np.float64]:
    """ggml's gated linear units, in double."""
    if kind == SWIGLU:
        return silu(gate) * up
    if kind == GEGLU:
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * gate * (1 + 0.044715 * gate**2))) * up
    if kind == SWIGLU_OAI:
        gate = np.minimum(gate, 7.0)
        return gate / (1 + np.exp(-1.702 * gate)) * (1 + np.clip(up, -7.0, 7.0))
    assert kind == SWIGLU_CLAMP
    return silu(np.minimum(gate, limit)) * np.clip(up, -limit, limit)


def check_fused(
    kernels: Kernels, rng: np.random.Generator, kernel: int, matrices: Experts, y: Floats,
    ids: Ints, kind: int | None,
) -> None:  # fmt: skip
    """With biases and, unless `kind` is None, a gate."""
    n_experts, rows, cols = matrices.values.shape
    bias, gate_bias = (rng.standard_normal((n_experts, rows)).astype(np.float32) for _ in "ab")
    expected = product(matrices, bias, y, ids)
    extra: dict[str, Any] = {"bias": bias}
    if kind is not None:
        gate = experts(matrices.qtype, n_experts, rows, cols, seed=4)
        expected = glu(kind, product(gate, gate_bias, y, ids), expected, 5.0)
        extra |= {"gate": gate, "gate_bias": gate_bias, "glu": kind, "limit": 5.0}
    run_all(
        lambda run: kernels.mul_mat_id(run, kernel, matrices, y, ids, skip=False, **extra),
        expected, ids, FUSED_NMSE, RUNS,
    )  # fmt: skip


# ---- one check of each kernel, by name ----------------------------------------------------------


def _ids(rng: np.random.Generator, n_tokens: int, skipped: str | None) -> Ints:
    ids = routing(rng, n_tokens, 4, 8)
    return ids if skipped is None else SKIPS[skipped](rng, ids)


def _one_mm_ids(kernels: Kernels, rng: np.random.Generator, skipped: str | None) -> None:
    check_mm_ids(kernels, IdsCase(33, 4, 8, 4, False), _ids(rng, 33, skipped))


def _one_mm_ids_inverse(kernels: Kernels, rng: np.random.Generator, skipped: str | None) -> None:
    check_mm_ids(kernels, IdsCase(33, 4, 8, 1, True), _ids(rng, 33, skipped))


def _one_quantize(kernels: Kernels, rng: np.random.Generator, skipped: str | None) -> None:
    ids = rng.permutation(20).astype(np.int32)
    if skipped is not None:
        ids[13:] = -1
    check_quantize(kernels, "Q4_K", _y(rng, 20, 1, 256)[:, 0], ids, 20, scatter=False)


def _one_scatter(kernels: Kernels, rng: np.random.Generator, skipped: str | None) -> None:
    ids = rng.permutation(20).reshape(5, 4).astype(np.int32)
    if skipped is not None:
        ids[ids > 12] = -1
    check_quantize(kernels, "Q4_K", _y(rng, 5, 1, 256)[:, 0], ids, 20, scatter=True)


def _y(rng: np.random.Generator, n_tokens: int, slots: int, cols: int) -> Floats:
    return rng.standard_normal((n_tokens, slots, cols)).astype(np.float32)


def _one_product(kernel: int, qtype: str, n_tokens: int, slots: int) -> "Check":
    def check(kernels: Kernels, rng: np.random.Generator, skipped: str | None) -> None:
        matrices = experts(qtype, 8, 32, 512)
        y = _y(rng, n_tokens, slots, 512)
        check_products(kernels, kernel, matrices, y, _ids(rng, n_tokens, skipped))

    return check


Check = Callable[[Kernels, np.random.Generator, "str | None"], None]
CHECKS: dict[str, Check] = {
    "mm_ids_helper": _one_mm_ids,
    "mm_ids_helper, inverse": _one_mm_ids_inverse,
    "quantize_mmq": _one_quantize,
    "quantize_mmq, scatter": _one_scatter,
    "mul_mat_vec_q": _one_product(VECTOR_Q, "Q4_K", 1, 1),
    "mul_mat_vec_q_moe": _one_product(VECTOR_Q, "Q4_K", 4, 1),
    "mul_mat_vec_f": _one_product(VECTOR_F, "F16", 1, 1),
    "mul_mat_vec_f, tokens": _one_product(VECTOR_F, "F16", 4, 4),
    "mul_mat_q": _one_product(OP, "Q4_K", 29, 4),
    "mul_mat_q, scatter": _one_product(OP, "Q4_K", 29, 1),
    "sorted rows": _one_product(OP, "F16", 29, 1),
}


def reason(kernels: Kernels, name: str, skipped: str | None) -> str | None:
    """Why a check fails; None if it does not."""
    try:
        CHECKS[name](kernels, np.random.default_rng(1), skipped)
    except (AssertionError, EmulationError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def main(arguments: Sequence[str]) -> int:
    library, slack, *names = arguments
    kernels = Kernels(Path(library), int(slack))
    failed = False
    for name in names or CHECKS:
        process = get_context("fork").Process(target=_report, args=(kernels, name))
        process.start()
        process.join()
        if process.exitcode:
            print(f"{name}: ended with {process.exitcode}", flush=True)
        failed |= process.exitcode != 0
    return int(failed)


def _report(kernels: Kernels, name: str) -> None:
    why = reason(kernels, name, "some")
    print(f"{name}: {'right' if why is None else why}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
