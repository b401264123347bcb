"""What is checked: an op or a whole branch, at a place, for so many tokens, with a routing.

Owns: cases and their names, the routings, the limits, what came of a case. Leaves out: tensors,
kernels, and running anything.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moequant.errors import UsageError

OPS = ("MUL_MAT_ID", "MOE_BRANCH")
TOKENS = (1, 2, 4, 5, 17, 32, 129, 512)
ROUTINGS = ("uniform", "one", "rotating", "skipped")
# NMSE: llama.cpp's own for MUL_MAT_ID (test-backend-ops.cpp). A branch has three such products
# (gate, up, down), each with its own rounding of activations; theirs for one with its GLU is 5e-3.
NMSE_LIMITS = {"MUL_MAT_ID": 5e-4, "MOE_BRANCH": 3 * 5e-4}
ROW_LIMIT = 1e-2  # for one row: those let one wrong row of some thousand pass
SKIPPED_SHARE = 0.4

PASSED, FAILED, ABORTED, HUNG = "passed", "failed", "aborted", "hung"
UNSUPPORTED, NOT_APPLICABLE, NOT_CHECKED = "not supported", "not applicable", "not checked"
FINDINGS = (FAILED, ABORTED, HUNG)


@dataclass(frozen=True)
class Case:
    """`subject` is a tensor's name, or `blk.N` for a branch; `place` is device/buffer type."""

    op: str
    subject: str
    place: str
    tokens: int
    routing: str

    @property
    def name(self) -> str:
        return f"{self.op},{self.subject},{self.place},{self.tokens},{self.routing}"

    @property
    def seed(self) -> list[int]:
        """Of the case's inputs and routing; the same at every place."""
        text = f"{self.op},{self.subject},{self.tokens},{self.routing}"
        return list(text.encode())


def parse_case(name: str) -> Case:
    """The case of that name.

    Raises:
        UsageError: it is none.
    """
    parts = name.split(",")
    if len(parts) == 5 and parts[0] in OPS and parts[4] in ROUTINGS and parts[3].isdecimal():
        case = Case(parts[0], parts[1], parts[2], int(parts[3]), parts[4])
        if 0 < case.tokens <= 1 << 16:
            return case
    raise UsageError(
        f"{name!r:.200} is no case: OP,TENSOR or LAYER,DEVICE/BUFFER,TOKENS,ROUTING, e.g. "
        "MUL_MAT_ID,blk.0.ffn_down_exps.weight,CPU/CPU,17,uniform; ops: "
        f"{', '.join(OPS)}; routings: {', '.join(ROUTINGS)}."
    )


@dataclass(frozen=True)
class CaseResult:
    """`nmse` over all of the output; `row` is the worst single row's, NaN where not computed."""

    case: Case
    verdict: str
    nmse: float = float("nan")
    row: float = float("nan")
    detail: str = ""
    part: str = ""  # of the file's tensors that was used


def route(case: Case, n_experts: int, k: int, random: np.random.Generator) -> npt.NDArray[np.int32]:
    """The experts of each token, [tokens, slots]; no expert twice for a token, -1 is skipped.

    `one` is a single slot for MUL_MAT_ID, and the same k experts for all tokens in a branch.
    """
    tokens = case.tokens
    if case.routing == "one":
        slots = 1 if case.op == "MUL_MAT_ID" else k
        chosen = random.permutation(n_experts)[:slots]
        return np.tile(chosen, (tokens, 1)).astype(np.int32)
    if case.routing == "rotating":
        flat = np.arange(tokens)[:, None] * k + np.arange(k)
        return (flat % n_experts).astype(np.int32)
    ids = np.stack([random.permutation(n_experts)[:k] for _ in range(tokens)]).astype(np.int32)
    if case.routing == "skipped":
        ids[random.random(ids.shape) < SKIPPED_SHARE] = -1
        ids[tokens // 2] = -1  # a whole token
        if tokens == 2:
            ids[:] = -1  # nobody comes to this bank
    return ids


def errors(got: npt.NDArray[np.float32], expected: npt.NDArray[np.float64]) -> tuple[float, float]:
    """(NMSE, worst row's), both arrays [..., rows].

    A row is one token's (and slot's) output, or one output of all tokens. Its squared error is
    relative to its own power or the mean power, whichever is larger; NaN where a value is not
    finite.
    """
    got64 = got.astype(np.float64).reshape(-1, got.shape[-1])
    expected = expected.reshape(got64.shape)
    if not np.isfinite(got64).all():
        return float("nan"), float("nan")
    squares, powers = (got64 - expected) ** 2, expected**2
    total, power = float(squares.mean()), float(powers.mean())
    if power == 0:
        return (0.0, 0.0) if total == 0 else (float("inf"), float("inf"))
    rows = [
        float((squares.mean(axis) / np.maximum(powers.mean(axis), power)).max()) for axis in (0, 1)
    ]
    return total / power, max(rows)


def judge(
    case: Case, got: npt.NDArray[np.float32], expected: npt.NDArray[np.float64]
) -> CaseResult:
    """Whether the output is right: finite, and within both limits."""
    nmse, row = errors(got, expected)
    missing = int(np.size(got) - np.isfinite(got).sum())
    detail = ""
    if missing:
        detail = f"{missing} of {got.size} values are not finite: never written, or made of such"
    elif nmse > NMSE_LIMITS[case.op]:
        detail = f"NMSE {nmse:.2g} > {NMSE_LIMITS[case.op]:g}"
    elif row > ROW_LIMIT:
        detail = f"a row is off by {row:.2g} > {ROW_LIMIT:g} of its power"
    return CaseResult(case, FAILED if detail else PASSED, nmse, row, detail)
