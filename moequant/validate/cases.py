"""What is checked: an op or a whole branch, at a place, for so many tokens, with a routing.

Owns: cases and their names, routings and inputs, the limits, what came of a case. Leaves out:
tensors, kernels, and running anything.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moequant.errors import UsageError

OPS = MUL_MAT_ID, ADD_ID, MOE_BRANCH = ("MUL_MAT_ID", "ADD_ID", "MOE_BRANCH")
TOKENS = (1, 2, 4, 5, 17, 32, 129, 512)
# some slots of each token skipped, whole tokens, all of them; `outliers` is `uniform` with inputs
# that stand out, as a trained model's do
SKIPPING = ("skipped", "skipped-tokens", "skipped-all")
ROUTINGS = ("uniform", "one", "rotating", "outliers", *SKIPPING)
SUBJECT_ROUTINGS = {
    MUL_MAT_ID: ROUTINGS,
    ADD_ID: ("uniform", "one", "rotating"),
    MOE_BRANCH: tuple(routing for routing in ROUTINGS if routing not in SKIPPING),
}
SKIPPED_SHARE = 0.4
OUTLIER_SHARE, OUTLIER_FACTOR = 1 / 64, 100.0  # of the input's channels

PASSED, FAILED, ABORTED, HUNG = "passed", "failed", "aborted", "hung"
ERROR = "error"  # of this program or of the machine; it says nothing about the kernels
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
class Limits:
    """Of the errors of a case; see `errors`. `value` and `bias` follow from `nmse`."""

    nmse: float

    @property
    def value(self) -> float:
        return 5 * math.sqrt(self.nmse)


@dataclass(frozen=True)
class Errors:
    """`nmse` of all values; `value`: the worst one's; `bias`: by how much all are too large.

    NaN where a value is not finite. `noise` is how large a bias rounding alone can make.
    """

    nmse: float = float("nan")
    value: float = float("nan")
    bias: float = float("nan")
    noise: float = float("nan")


@dataclass(frozen=True)
class CaseResult:
    """What came of a case; `limit` is its NMSE's, `part` what of the file's tensors was used."""

    case: Case
    verdict: str
    errors: Errors = Errors()
    limit: float = float("nan")
    detail: str = ""
    part: str = ""


# llama.cpp's own limit for MUL_MAT_ID (test-backend-ops.cpp), whose activations are rounded to 8
# bits. ggml's CPU does not do so where weights are floats; other backends may.
NMSE_LIMIT = 5e-4
CPU_LIMITS = {"F32": 1e-9, "F16": 1e-6, "BF16": 1e-5}
ADD_ID_LIMIT = 1e-12  # of sums of two float32, which are rounded once: about 1e-15
BRANCH_FACTOR = 3  # a branch has three such products, each with its own rounding
OUTLIER_LIMIT = 10  # times as much: what stands out sets the step for its whole block
BIAS_LIMIT = 3e-3
SIGMAS = 4  # of what rounding alone may add to that
INDEPENDENT = 8  # errors of a token's output; they share its rounded activations (measured: 10)


def limits(case: Case, qtypes: Sequence[str], backend: str) -> Limits:
    """Of a case whose matrices have these types."""
    if case.op == ADD_ID:
        return Limits(ADD_ID_LIMIT)
    known = CPU_LIMITS if backend == "CPU" else {}
    limit = max(known.get(qtype, NMSE_LIMIT) for qtype in qtypes)
    limit *= BRANCH_FACTOR if case.op == MOE_BRANCH else 1
    return Limits(limit * (OUTLIER_LIMIT if case.routing == "outliers" else 1))


def inputs(
    case: Case, shape: tuple[int, ...], random: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Standard normal; for `outliers` with some channels a hundred times as large."""
    x = random.standard_normal(shape, np.float32)
    if case.routing == "outliers":
        count = max(1, round(shape[-1] * OUTLIER_SHARE))
        x[..., random.permutation(shape[-1])[:count]] *= OUTLIER_FACTOR
    return x


EDGES = (0, 1, 31, 32, 63, 64, 127, 128, 255, 256)  # of tiles


def spots(full: int, count: int, random: np.random.Generator) -> npt.NDArray[np.intp]:
    """`count` of `full` indices: both ends, both sides of tile edges, and others at random."""
    if count >= full:
        return np.arange(full)
    edges = np.unique([i for i in (*EDGES, full - 33, full - 32, full - 2, full - 1) if i < full])
    others = random.permutation(np.setdiff1d(np.arange(full), edges))
    return np.sort(np.r_[edges, others][:count])


def _experts(
    case: Case, n_experts: int, k: int, random: np.random.Generator
) -> npt.NDArray[np.int32]:
    """The k experts of each token, none twice, [tokens, k]."""
    tokens = case.tokens
    if case.routing == "one":
        return np.tile(random.permutation(n_experts)[:k], (tokens, 1)).astype(np.int32)
    if case.routing == "rotating":
        flat = np.arange(tokens)[:, None] * k + np.arange(k)
        return (flat % n_experts).astype(np.int32)
    return np.stack([random.permutation(n_experts)[:k] for _ in range(tokens)]).astype(np.int32)


def route_op(
    case: Case, table: npt.NDArray[np.int32], k: int, random: np.random.Generator
) -> npt.NDArray[np.int32]:
    """The matrices of each token's slots for an op, [tokens, slots]; -1 is skipped.

    `table[e]` is the matrix of the layer's expert e, or -1 where a bank does not have it; at least
    one slot is not -1 unless the case skips. `one` is a single slot, or of a bank one of the k.
    """
    here = table[table >= 0]
    if case.routing == "one":
        ids = np.full((case.tokens, 1 if len(here) == len(table) else k), -1, np.int32)
        ids[:, 0] = random.choice(here)
        return ids
    ids = table[_experts(case, len(table), k, random)]
    if (ids < 0).all():
        ids[0, 0] = random.choice(here)
    ids[_skipped(case, ids, random)] = -1
    return ids


def _skipped(
    case: Case, ids: npt.NDArray[np.int32], random: np.random.Generator
) -> npt.NDArray[np.bool_]:
    tokens, k = ids.shape
    if case.routing == "skipped-all":
        return np.ones(ids.shape, bool)
    if case.routing == "skipped-tokens" or (case.routing == "skipped" and k == 1):
        whole = random.random((tokens, 1)) < SKIPPED_SHARE
        whole[0] = False
        whole[tokens // 2] = True
        return np.broadcast_to(whole, ids.shape)
    skipped = np.zeros(ids.shape, bool)
    if case.routing != "skipped":
        return skipped
    skipped[:] = random.random(ids.shape) < SKIPPED_SHARE
    kept = (ids >= 0).argmax(axis=1)  # of each token one is left, and one is not
    skipped[np.arange(tokens), (kept + random.integers(1, k, tokens)) % k] = True
    skipped[np.arange(tokens), kept] = False
    return skipped


def route_branch(
    case: Case,
    n_experts: int,
    k: int,
    known: npt.NDArray[np.intp],
    random: np.random.Generator,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.intp]]:
    """(each token's k experts, [tokens, k]; the tokens that only have experts in `known`).

    With all experts known these are all tokens, else CHECKED_TOKENS, or all for `one`.
    """
    ids = _experts(case, n_experts, k, random)
    if len(known) == n_experts:
        return ids, np.arange(case.tokens)
    checked = spots(case.tokens, CHECKED_TOKENS, random)
    rows = slice(None) if case.routing == "one" else checked
    ids[rows] = known[_experts(case, len(known), k, random)[rows]]
    return ids, checked


CHECKED_TOKENS = 32  # of a branch's case, where not all experts are decoded


def errors(
    got: npt.NDArray[np.float32], expected: npt.NDArray[np.float64], scale: npt.NDArray[np.float64]
) -> Errors:
    """Of an output whose single values have the size `scale` (broadcast), rounding's measure."""
    if not np.isfinite(got).all():
        return Errors()
    wrong = got - expected
    power = float((expected**2).sum())
    if power == 0:
        worst = 0.0 if not wrong.any() else float("inf")
        return Errors(worst, worst, worst, 0.0)
    relative = np.divide(wrong, scale, out=np.where(wrong == 0, 0.0, np.inf), where=scale > 0)
    nmse = float((wrong**2).sum()) / power
    return Errors(nmse, float(np.abs(relative).max()), float((wrong * expected).sum()) / power,
                  math.sqrt(nmse / (wrong.size // wrong.shape[-1] * INDEPENDENT)))  # fmt: skip


def judge(case: Case, found: Errors, limit: Limits, detail: str = "") -> CaseResult:
    """Whether an output is right: nothing told against it in `detail`, and within the limits."""
    bias = BIAS_LIMIT + SIGMAS * found.noise
    if detail:
        pass
    elif not math.isfinite(found.nmse):
        detail = "values that are not finite, or not zero where all should be"
    elif found.nmse > limit.nmse:
        detail = f"NMSE {found.nmse:.2g} > {limit.nmse:g}"
    elif found.value > limit.value:
        detail = f"a value is off by {found.value:.2g} > {limit.value:.2g} of its scale"
    elif abs(found.bias) > bias:
        detail = f"all values are off by {found.bias:+.2%} on the average, more than {bias:.2%}"
    return CaseResult(case, FAILED if detail else PASSED, found, limit.nmse, detail)
