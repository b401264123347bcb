"""Importance statistics of a model's matrices, and what a quantizer is given of them.

Owns: the sums per tensor, the importance computed from them, checking them against a model, and the
report on experts. Leaves out: the file (`imatrix_file`), how the sums came about (`run`).

Importance of column j of matrix e is the mean of x_j² over the tokens that reached e, weighted by
g² where gates are known, near-miss tokens among them, shrunk toward the mean over all experts:

    s_e  = (gate_in_sum2_e + near_miss_in_sum2_e) / (gate_counts_e + near_miss_gate_counts_e)
    s'_e ~ (n_e·s_e/|s_e| + κ·s_pool/|s_pool|) / (n_e + κ)
    n_e  = counts_e + near_miss_gate_counts_e / (Σ gate_counts / Σ counts)

s_pool has the sums over all experts in the place of those of one; |s| is the mean over columns.
Each row of importance may be multiplied by any positive number without changing what a quantizer
does with it, so κ has to mix rows of one size; s'_e then gets the size of s_e back. A lent token
counts as much as its g² in units of a routed token's mean g², so a faint near miss outweighs
nothing. An expert that saw nothing gets s_pool. For files by llama-imatrix there are plain sums
only, n_e = counts_e and κ = 0.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moequant.errors import ImatrixError, listing

Floats = NDArray[np.float32]

_MODEST = 60  # binary exponent of a mean up to which a row is left as it is


@dataclass(frozen=True)
class MatrixStatistics:
    """Sums of one GGUF tensor; all float32.

    `in_sum2` (n_matrices, columns), `counts` (n_matrices,): plain sums over routed tokens, what
    llama-imatrix has (it may keep one count for all matrices: (1,)). `gate_*`: weighted by g².
    `near_miss_*`: over lent tokens, weighted by g²; `near_miss_counts` is their number.
    """

    in_sum2: Floats
    counts: Floats
    gate_in_sum2: Floats | None = None
    gate_counts: Floats | None = None
    near_miss_in_sum2: Floats | None = None
    near_miss_counts: Floats | None = None
    near_miss_gate_counts: Floats | None = None

    def tokens(self) -> Floats:
        """Tokens seen by each matrix, lent ones included."""
        return self.counts if self.near_miss_counts is None else self.counts + self.near_miss_counts

    def effective_tokens(self) -> NDArray[np.float64]:
        """Tokens seen by each matrix, a lent one counted by its g² (n_e of the module's text)."""
        routed = self.counts.astype(np.float64)
        lent, gates = self.near_miss_gate_counts, self.gate_counts
        if lent is None or gates is None or not gates.any() or not routed.any():
            return routed
        mean_gate = float(gates.sum(dtype=np.float64) / routed.sum())
        return routed + lent.astype(np.float64) / mean_gate

    def is_empty(self) -> bool:
        """Whether nothing was seen at all, by no matrix: no tokens, or zeros only."""
        sums, weights = _weighted(self, len(self.in_sum2), self.in_sum2[0].size)
        return not sums[weights > 0].any()


@dataclass(frozen=True)
class ExpertReport:
    """What calibration had for one expert: tokens routed to it, lent to it, and its share (0 to 1)
    of the layer's routed tokens. `floor` is what it should have had."""

    layer: int
    expert: int
    tokens: int
    near_miss: int
    floor: int
    share: float

    def __str__(self) -> str:
        """One line for a report."""
        wanted = f" of {self.floor} wanted" if self.floor else ""
        return (
            f"layer {self.layer}, expert {self.expert}: routed tokens {self.tokens}{wanted}, "
            f"{self.share:.3%} of the layer's; near misses lent: {self.near_miss}"
        )


@dataclass
class Imatrix:
    """Statistics by GGUF weight name, and where they are from.

    `chunk_size`: tokens of a sequence, `chunk_count`: sequences. `metadata`: the `moequant.*` keys.
    """

    entries: dict[str, MatrixStatistics]
    datasets: list[str] = field(default_factory=list)
    chunk_count: int = 0
    chunk_size: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def kappa(self) -> float:
        """Strength of shrinkage in tokens; 0 for files that are not ours."""
        return float(self.metadata.get("moequant.calibration.kappa", 0.0))

    @property
    def floor(self) -> int:
        """Tokens an expert should have seen; 0 for files that are not ours."""
        return int(self.metadata.get("moequant.calibration.floor", 0))

    def write(self, path: Path) -> None:
        """Write the file, all of it or nothing; raises ExportError."""
        from moequant.calibrate.imatrix_file import write_imatrix

        write_imatrix(self, path)

    @classmethod
    def read(cls, path: Path) -> "Imatrix":
        """Read a file of ours or of llama-imatrix; raises ImatrixError."""
        from moequant.calibrate.imatrix_file import read_imatrix

        return read_imatrix(path)

    def importance(self, name: str, n_matrices: int, n_per_row: int) -> Floats | None:
        """Importance of the tensor `name`, float32 (n_matrices, n_per_row), >= 0, finite.

        None where there are no statistics for it, or nothing was seen in total. Raises
        ImatrixError where they do not fit.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        if wrong := _misfit(name, entry, n_matrices, n_per_row):
            raise ImatrixError(f"the imatrix belongs to another model: {wrong}")
        if entry.is_empty():
            return None
        sums, weights = _weighted(entry, n_matrices, n_per_row)
        tokens = np.broadcast_to(entry.effective_tokens(), (n_matrices,))
        has_weight = weights > 0
        pooled = sums[has_weight].sum(0) / weights[has_weight].sum()
        made = np.tile(pooled, (n_matrices, 1))
        seen = has_weight & (tokens > 0) & sums.any(1)
        own = sums[seen] / weights[seen, None]
        size = own.mean(1, keepdims=True)
        share = (tokens[seen] / (tokens[seen] + self.kappa))[:, None]
        made[seen] = share * own + (1 - share) * size * (pooled / pooled.mean())
        return _within_float32(made)

    def check(self, tensors: Iterable[tuple[str, int, int]]) -> tuple[str, ...]:
        """Hold the entries against a model's matrices (name, n_matrices, n_per_row).

        Returns the names without statistics, or with empty ones, for the caller to report. Raises
        ImatrixError that lists every shape that does not fit, or when nothing fits at all.
        """
        wanted = list(tensors)
        wrong = [
            text
            for name, n_matrices, columns in wanted
            if name in self.entries
            and (text := _misfit(name, self.entries[name], n_matrices, columns))
        ]
        if wrong:
            raise ImatrixError(f"the imatrix belongs to another model:{listing(wrong)}")
        missing = tuple(
            name
            for name, _, _ in wanted
            if name not in self.entries or self.entries[name].is_empty()
        )
        if wanted and len(missing) == len(wanted):
            raise ImatrixError(
                "the imatrix has nothing for this model: "
                f"it has {', '.join([*self.entries][:3])} …, "
                f"the model has {', '.join(missing[:3])} …"
            )
        return missing

    def experts(self) -> Iterator[ExpertReport]:
        """A report for every expert of every layer, in order."""
        for layer, entry in sorted(self._expert_entries().items()):
            lent = entry.near_miss_counts
            total = float(entry.counts.sum()) or 1.0
            for expert, tokens in enumerate(entry.counts):
                near_miss = 0 if lent is None else int(lent[expert])
                share = float(tokens) / total
                yield ExpertReport(layer, expert, int(tokens), near_miss, self.floor, share)

    def thin_experts(self) -> list[ExpertReport]:
        """Experts with fewer routed tokens than the floor, whatever was lent to them.

        Where the floor is 0, as for a file that is not ours: the experts without any token.
        """
        least = max(self.floor, 1)
        return [report for report in self.experts() if report.tokens < least]

    def routed_share(self) -> dict[int, list[float]]:
        """For each layer with experts, the share (0 to 1) of its routed tokens by expert."""
        shares: dict[int, list[float]] = {}
        for report in self.experts():
            shares.setdefault(report.layer, []).append(report.share)
        return shares

    def _expert_entries(self) -> dict[int, MatrixStatistics]:
        found = {}
        for name, entry in self.entries.items():
            parts = name.split(".")
            is_down = len(parts) == 4 and parts[0] == "blk" and parts[2] == "ffn_down_exps"
            if is_down and parts[1].isdecimal():
                found[int(parts[1])] = entry
        return found


def _misfit(name: str, entry: MatrixStatistics, n_matrices: int, columns: int) -> str:
    """What is wrong with an entry's shape, "" if nothing."""
    sums, counts = entry.in_sum2.size, entry.counts.size
    if sums == n_matrices * columns and counts in (1, n_matrices):
        return ""
    return (
        f"{name} has sums for {sums} columns and {counts} counts, "
        f"the model's tensor has {n_matrices} x {columns} columns"
    )


def _within_float32(rows: NDArray[np.float64]) -> Floats:
    """Rows as float32; of a size near float32's ends, divided by a power of two (rows may be)."""
    exponents = np.frexp(rows.mean(1))[1]
    shifts = np.where(np.abs(exponents) > _MODEST, -exponents, 0)
    return np.ldexp(rows, shifts[:, None]).astype(np.float32)


def _weighted(
    entry: MatrixStatistics, n_matrices: int, columns: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums (n_matrices, columns) and their weights (n_matrices,), near misses added."""
    if entry.gate_in_sum2 is None or entry.gate_counts is None:
        sums, weights = entry.in_sum2.astype(np.float64), entry.counts.astype(np.float64)
    else:
        sums, weights = entry.gate_in_sum2.astype(np.float64), entry.gate_counts.astype(np.float64)
        if entry.near_miss_in_sum2 is not None and entry.near_miss_gate_counts is not None:
            sums = sums + entry.near_miss_in_sum2
            weights = weights + entry.near_miss_gate_counts
    if len(weights) == 1:  # llama-imatrix keeps one count where all matrices see all tokens
        weights = np.full(n_matrices, weights[0])
    return sums.reshape(n_matrices, columns), weights
