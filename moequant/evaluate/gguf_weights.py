"""A GGUF file's tensors under the names its checkpoint gives them, so that one forward runs both.

Owns: finding the bytes behind a checkpoint name (in any file of a split model, in any bank, in one
tensor or in two halves of it), decoding them, and refusing what is not finite. Leaves out: the
forward, and the description of the model, which comes from the checkpoint (`describe`) or from the
file itself (`describe_gguf`). The decoder is `gguf.quants`' (NumPy, not ours), so that values do
not rest on the code that encoded them.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from moequant.architectures import ModelSpec, TensorSpec
from moequant.checkpoint.finite import not_finite
from moequant.errors import GGUFError, listing
from moequant.expert_banks import ExpertBanks, read_banks
from moequant.gguf_file import GGUFFile, GGUFTensor


@dataclass(frozen=True)
class Halves:
    """Two tensors that stand for one of `shape` (experts, rows, in).

    The first has the first half of each matrix's rows, the second the last half.
    """

    shape: tuple[int, ...]
    halves: tuple[GGUFTensor | ExpertBanks, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of both, without maps of banks."""
        return sum(half.nbytes for half in self.halves)


Stack = GGUFTensor | ExpertBanks | Halves
"""One tensor of the model: as it is in the file, in banks, or in halves; all have `shape`."""


@dataclass(frozen=True)
class Place:
    """Where a checkpoint tensor's values are: a tensor of the file, or one matrix of a 3-D one."""

    tensor: Stack
    matrix: int | None
    dtype: torch.dtype = torch.float32


class GGUFWeights:
    """The weights of `file`, read as the checkpoint that `model` describes would be.

    Raises:
        GGUFError: a tensor of the model is missing in the file, of another shape or of a type that
            `gguf.quants` does not decode, or expert banks are damaged.
    """

    def __init__(self, file: GGUFFile, model: ModelSpec) -> None:
        self._file = file
        self._model = model
        self._stacks = _stacks(file, model)
        wrong = [
            f"{spec.name}: {_found(self._stacks, spec)}, {spec.shape} in the model"
            for spec in model.tensors
            if spec.name not in self._stacks or self._stacks[spec.name].shape != spec.shape
        ]
        if wrong:
            raise GGUFError(f"{file.path} is not a file of this model:{listing(wrong)}")
        _check_types(file, [self._stacks[spec.name] for spec in model.tensors])

    @cached_property
    def tensors(self) -> dict[str, Place]:
        """Checkpoint name → where its values are."""
        places = {}
        for spec in self._model.tensors:
            stack = self._stacks[spec.name]
            for index, source in enumerate(spec.sources):
                places[source] = Place(stack, index if len(spec.sources) > 1 else None)
        return places

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in float32, in the checkpoint's shape.

        Raises GGUFError, as `read_slice` does, for NaN and Inf among what is read.
        """
        place = self.tensors[name]
        shape = place.tensor.shape
        if place.matrix is not None:
            return self._matrices(place.tensor, place.matrix, place.matrix + 1)[0]
        if len(shape) == 3:
            return self._matrices(place.tensor, 0, shape[0])
        return self._rows(_single(place.tensor), 0, _rows_of(shape)).reshape(shape)

    def read_slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries start:stop of axis 0 in float32; decodes no more than these."""
        place = self.tensors[name]
        shape = place.tensor.shape
        if place.matrix is not None or len(shape) < 2:
            return self.read(name)[start:stop]
        if len(shape) == 3:
            return self._matrices(place.tensor, start, stop)
        return self._rows(_single(place.tensor), start, stop)

    def _matrices(self, stack: Stack, start: int, stop: int) -> torch.Tensor:
        """Matrices start:stop of a 3-D tensor, float32 (stop - start, rows, in)."""
        _, rows, _ = stack.shape
        if isinstance(stack, GGUFTensor):
            values = self._rows(stack, start * rows, stop * rows)
            return values.reshape(stop - start, *stack.shape[1:])
        values = torch.empty(stop - start, *stack.shape[1:])
        for expert in range(start, stop):
            values[expert - start] = self._matrix(stack, expert)
        return values

    def _matrix(self, stack: Stack, expert: int) -> torch.Tensor:
        """One matrix of a 3-D tensor, float32 (rows, in)."""
        if isinstance(stack, Halves):
            return torch.cat([self._matrix(half, expert) for half in stack.halves])
        tensor, index = stack.place(expert) if isinstance(stack, ExpertBanks) else (stack, expert)
        rows = stack.shape[1]
        return self._rows(tensor, index * rows, (index + 1) * rows)

    def _rows(self, tensor: GGUFTensor, start: int, stop: int) -> torch.Tensor:
        """Rows start:stop as float32 (rows, cols); all leading axes count as rows."""
        row_bytes = tensor.nbytes // _rows_of(tensor.shape)
        data = self._file.read(tensor.name, start * row_bytes, stop * row_bytes)
        qtype = GGMLQuantizationType[tensor.qtype]
        with np.errstate(all="ignore"):  # what comes out is checked, whatever went in
            values = dequantize(data.reshape(stop - start, row_bytes), qtype)
            rows = torch.from_numpy(np.array(values, dtype=np.float32))
        counts = not_finite(rows)
        if counts:
            raise GGUFError(
                f"{tensor.path}: {tensor.name} ({tensor.qtype}) has {counts} among "
                f"{rows.numel()} values read. The file is damaged: make it again, or download it "
                "again."
            )
        return rows


def stored(file: GGUFFile, model: ModelSpec) -> dict[str, tuple[str, int]]:
    """Name of each of the model's tensors → its type and its bytes in the file.

    Of a tensor in banks or in halves the types are joined by "+", in their order, each named once;
    the bytes are those of all of them, without the maps. Raises GGUFError as `GGUFWeights` does for
    damaged banks.
    """
    stacks = _stacks(file, model)
    found = {}
    for spec in model.tensors:
        stack = stacks.get(spec.name)
        if stack is not None:
            qtypes = dict.fromkeys(tensor.qtype for tensor in _parts(stack))
            found[spec.name] = ("+".join(qtypes), stack.nbytes)
    return found


@functools.cache
def decoded_types() -> frozenset[str]:
    """The types that `gguf.quants.dequantize` decodes to floats, found by asking it."""
    integers = {"I8", "I16", "I32", "I64", "F64"}
    names = (qtype.name for qtype in GGMLQuantizationType)
    return frozenset(name for name in names if name not in integers and _decodes(name))


def _decodes(name: str) -> bool:
    qtype = GGMLQuantizationType[name]
    _, type_size = GGML_QUANT_SIZES[qtype]
    try:
        dequantize(np.zeros((1, type_size), np.uint8), qtype)
    except NotImplementedError:
        return False
    return True


def _stacks(file: GGUFFile, model: ModelSpec) -> dict[str, Stack]:
    """Every tensor under its name, and banks and halves under that of what they stand for."""
    single: dict[str, GGUFTensor | ExpertBanks] = {**file.tensors, **read_banks(file)}
    joined = {
        spec.name: Halves(spec.shape, tuple(single[half] for half in spec.halves))
        for spec in model.tensors
        if spec.halves and all(_is_half(single.get(half), spec) for half in spec.halves)
    }
    return {**joined, **single}


def _is_half(stack: GGUFTensor | ExpertBanks | None, spec: TensorSpec) -> bool:
    return stack is not None and stack.shape == spec.half_shape


def _parts(stack: Stack) -> tuple[GGUFTensor, ...]:
    if isinstance(stack, Halves):
        return tuple(tensor for half in stack.halves for tensor in _parts(half))
    return (stack,) if isinstance(stack, GGUFTensor) else stack.banks


def _single(stack: Stack) -> GGUFTensor:
    """A stack that is no expert tensor, so that it cannot be in banks."""
    (tensor,) = _parts(stack)
    return tensor


def _check_types(file: GGUFFile, stacks: list[Stack]) -> None:
    wrong = list(_undecodable(stacks))
    if wrong:
        raise GGUFError(
            f"{file.path}: {len(wrong)} tensors have a type that cannot be decoded:"
            f"{listing(wrong)}\nThese are decoded: {', '.join(sorted(decoded_types()))}."
        )


def _undecodable(stacks: list[Stack]) -> Iterator[str]:
    for stack in stacks:
        for tensor in _parts(stack):
            if tensor.qtype not in decoded_types():
                yield f"{tensor.name}: {tensor.qtype}"


def _rows_of(shape: tuple[int, ...]) -> int:
    """Rows of a tensor, all leading axes flattened; a vector is one row."""
    rows = 1
    for axis in shape[:-1]:
        rows *= axis
    return rows


def _found(stacks: dict[str, Stack], spec: TensorSpec) -> str:
    stack = stacks.get(spec.name)
    if stack is not None:
        return f"{stack.shape} in the file"
    halves = [f"{half} {stacks[half].shape}" for half in spec.halves if half in stacks]
    return f"only {' and '.join(halves)} in the file" if halves else "missing"
