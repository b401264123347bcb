"""How much each expert's quantization error weighs: measured, by quantizing every expert once.

Owns: the score that experts are ranked by. Leaves out: what becomes of the ranking (`plan`).

    score_e = (Σ_tokens g²) · Σ_ij s_ej · (W_ij − Ŵ_ij)²

Ŵ is the expert's matrix in the plan's type, encoded and decoded as in the file; s_e the importance
it is encoded with, a mean of x² over the tokens that reach e. The first factor, the squared gate
mass, turns that mean into a sum over all tokens routed to e, so that an expert that is never used
has score 0. It is the squared error of the matrix's output, each token's times g², as far as the
diagonal of Σ g²·x·xᵀ tells it.
"""

from collections.abc import Iterable

import torch

from moequant.architectures import ModelSpec, TensorSpec
from moequant.calibrate import Imatrix
from moequant.checkpoint import Checkpoint
from moequant.errors import ImatrixError, listing
from moequant.gguf_export.model_file import CHUNK_VALUES, Progress, importance_of, load_matrix
from moequant.plan import TensorPlan
from moequant.quants import dequantize, quantize


def expert_scores(
    checkpoint: Checkpoint,
    model: ModelSpec,
    stacks: Iterable[TensorPlan],
    imatrix: Imatrix,
    device: str = "cpu",
    progress: Progress = lambda *_: None,
) -> dict[str, list[float]]:
    """Name of each of `stacks` → one score per expert; one matrix is in memory at a time.

    Raises:
        ImatrixError: the imatrix has no gates for a stack, or is of another model.
        CheckpointError: a weight holds NaN or Inf.
    """
    planned = list(stacks)
    check_gates(imatrix, planned)
    specs = {spec.name: spec for spec in model.tensors}
    total, done = sum(tensor.shape[0] for tensor in planned), 0
    scores: dict[str, list[float]] = {}
    for tensor in planned:
        spec = specs[tensor.name]
        importance = importance_of(imatrix, spec, tensor.qtype)
        masses = imatrix.entries[tensor.name].gate_counts
        assert importance is not None  # check_gates
        assert masses is not None
        scores[tensor.name] = []
        for expert, mass in enumerate(masses.reshape(-1).tolist()):
            row = importance[expert].to(device)
            error = _weighted_error(checkpoint, spec, expert, tensor.qtype, row)
            scores[tensor.name].append(mass * error)
            done += 1
            progress("measure experts", done, total)
    return scores


def check_gates(imatrix: Imatrix, stacks: Iterable[TensorPlan]) -> None:
    """ImatrixError that lists the stacks for which the imatrix does not say how gates weigh."""
    without = [tensor.name for tensor in stacks if not _has_gates(imatrix, tensor)]
    if without:
        raise ImatrixError(
            "per-expert precision ranks experts by their gates, which the imatrix has not for:"
            f"{listing(without)}\nllama-imatrix does not keep them; make the imatrix with "
            "`moequant calibrate`, or leave out --imatrix."
        )


def _has_gates(imatrix: Imatrix, tensor: TensorPlan) -> bool:
    entry = imatrix.entries.get(tensor.name)
    if entry is None or entry.gate_counts is None or entry.is_empty():
        return False
    return entry.gate_counts.size == tensor.shape[0]


def _weighted_error(
    checkpoint: Checkpoint, spec: TensorSpec, expert: int, qtype: str, importance: torch.Tensor
) -> float:
    """Σ_ij s_j (W_ij − Ŵ_ij)² of one expert's matrix, in float64."""
    cols = spec.shape[-1]
    step = max(1, CHUNK_VALUES // cols)
    by_column = torch.zeros(cols, dtype=torch.float64, device=importance.device)
    for values in load_matrix(checkpoint, spec, expert, step):
        for rows in values.reshape(-1, cols).split(step):
            exact = rows.to(importance.device, torch.float32)
            decoded = dequantize(quantize(exact, qtype, importance), qtype, cols)
            by_column += (exact - decoded).square_().sum(0, dtype=torch.float64)
    return float(by_column @ importance.double())
