"""Packs a model into a GGUF file: each tensor read, quantized as planned, and streamed out.

Owns: the walk over the tensors and the rows of each. Leaves out: the plan, the encoders, and the
file format. Memory holds one matrix as the checkpoint stores it and one chunk of it in float32; of
an embedding table, one chunk.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from moequant.architectures import ModelSpec, TensorSpec
from moequant.architectures.ops import Copy
from moequant.calibrate import Imatrix
from moequant.checkpoint import Checkpoint, check_finite
from moequant.gguf_export.banks import Part, parts
from moequant.gguf_export.metadata import MetadataEntry
from moequant.gguf_export.writer import Piece, TensorToWrite, write_gguf
from moequant.plan import Plan
from moequant.quants import QUANT_TYPES, quantize

CHUNK_VALUES = 1 << 24  # float32 values that are packed at a time: 64 MiB
UNWEIGHTED = frozenset({"F32", "F16", "BF16", "Q8_0"})  # types that importance cannot help

Progress = Callable[[str, int, int], None]


def write_model(
    path: Path,
    checkpoint: Checkpoint,
    model: ModelSpec,
    plan: Plan,
    imatrix: Imatrix | None,
    metadata: list[MetadataEntry],
    device: str = "cpu",
    progress: Progress = lambda *_: None,
) -> None:
    """Write the GGUF file that `plan` describes, whole or not at all.

    Raises:
        CheckpointError: a weight holds NaN or Inf.
        ImatrixError: the imatrix is of another shape than the model.
        ExportError: writing failed.
    """
    specs = {spec.name: spec for spec in model.tensors}
    written = {part.tensor.name: part for part in parts(plan)}
    total, done = sum(part.tensor.nbytes for part in written.values()), 0

    def pieces(tensor: TensorToWrite) -> Iterator[Piece]:
        nonlocal done
        part = written[tensor.name]
        spec = specs[part.planned.name]
        for piece in _part(checkpoint, spec, part, imatrix, device):
            yield piece
            done += len(piece)
            progress("quantize", done, total)

    tensors = [part.tensor for part in written.values()]
    write_gguf(path, model.architecture, metadata, tensors, pieces)


def load_matrix(
    checkpoint: Checkpoint, spec: TensorSpec, index: int, step: int
) -> Iterator[torch.Tensor]:
    """Matrix `index` of a tensor in the checkpoint's dtype, whole or in pieces of rows.

    Raises CheckpointError where it holds NaN or Inf.
    """
    for values in _load(checkpoint, spec, index, step):
        if spec.sources:
            source = spec.sources[index if len(spec.sources) > 1 else 0]
            check_finite(source, values, checkpoint.tensors[source].file)
        yield values


def _part(
    checkpoint: Checkpoint, spec: TensorSpec, part: Part, imatrix: Imatrix | None, device: str
) -> Iterator[Piece]:
    """The bytes of one tensor of the file."""
    if part.data is not None:
        yield part.data
        return
    qtype = part.tensor.qtype
    matrices = range(spec.n_matrices) if part.matrices is None else part.matrices
    importance = importance_of(imatrix, spec, qtype)
    yield from _pack(checkpoint, spec, matrices, qtype, importance, device)


def importance_of(imatrix: Imatrix | None, spec: TensorSpec, qtype: str) -> torch.Tensor | None:
    """Importance per matrix and column, shape (n_matrices, cols), or None."""
    if imatrix is None or len(spec.shape) < 2 or qtype in UNWEIGHTED:
        return None
    importance = imatrix.importance(spec.name, spec.n_matrices, spec.shape[-1])
    return None if importance is None else torch.from_numpy(importance)


def _pack(
    checkpoint: Checkpoint,
    spec: TensorSpec,
    matrices: Iterable[int],
    qtype: str,
    importance: torch.Tensor | None,
    device: str,
) -> Iterator[memoryview]:
    """The bytes of `matrices`, a chunk of rows at a time; one importance row for each matrix."""
    cols = spec.shape[-1]
    if cols % QUANT_TYPES[qtype].block_size:
        raise AssertionError(f"the plan gave {qtype} to rows of {cols}")
    step = max(1, CHUNK_VALUES // cols)
    for index in matrices:
        row = None if importance is None else importance[index].to(device)
        for values in load_matrix(checkpoint, spec, index, step):
            for rows in values.reshape(-1, cols).split(step):
                packed = quantize(rows.to(device, torch.float32), qtype, row)
                yield packed.cpu().numpy().reshape(-1).data


def _load(
    checkpoint: Checkpoint, spec: TensorSpec, index: int, step: int
) -> Iterator[torch.Tensor]:
    """Matrix `index` of a tensor; one that is stored as it is, `step` rows at a time.

    Embedding tables are the largest matrices of a model, and stored so.
    """
    if len(spec.shape) == 3:
        yield spec.load(checkpoint, index)
    elif len(spec.shape) == 2 and isinstance(spec.op, Copy):
        for start in range(0, spec.shape[0], step):
            stop = min(start + step, spec.shape[0])
            yield checkpoint.read_slice(spec.sources[0], start, stop)
    else:
        yield spec.load(checkpoint)
