"""A GGUF file's tensors under the names its checkpoint gives them, so that one forward runs both.

Owns: finding the bytes behind a checkpoint name, and decoding them. Leaves out: the forward. The
decoder is `gguf.quants`' (NumPy, not ours), so that values do not rest on the code that encoded
them; which tensor is which rests on the `ModelSpec` that the file was made from.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize

from moequant.architectures import ModelSpec, TensorSpec
from moequant.errors import GGUFError, listing
from moequant.gguf_file import GGUFFile, GGUFTensor


@dataclass(frozen=True)
class Place:
    """Where a checkpoint tensor's values are: a GGUF tensor, or one matrix of a 3-D one."""

    tensor: GGUFTensor
    matrix: int | None
    dtype: torch.dtype = torch.float32


class GGUFWeights:
    """The weights of `file`, read as the checkpoint that `model` describes would be.

    Raises:
        GGUFError: a tensor of the model is missing in the file, or of another shape.
    """

    def __init__(self, file: GGUFFile, model: ModelSpec) -> None:
        self._file = file
        self._model = model
        wrong = [
            f"{spec.name}: {_found(file, spec)}, {spec.shape} in the checkpoint"
            for spec in model.tensors
            if spec.name not in file.tensors or file.tensors[spec.name].shape != spec.shape
        ]
        if wrong:
            raise GGUFError(f"{file.path} is not a file of this model:{listing(wrong)}")

    @cached_property
    def tensors(self) -> dict[str, Place]:
        """Checkpoint name → where its values are."""
        places = {}
        for spec in self._model.tensors:
            tensor = self._file.tensors[spec.name]
            for index, source in enumerate(spec.sources):
                places[source] = Place(tensor, index if len(spec.sources) > 1 else None)
        return places

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in float32, in the checkpoint's shape."""
        place = self.tensors[name]
        shape = place.tensor.shape
        if place.matrix is None:
            return self._decode(place.tensor, 0, _rows(shape)).reshape(shape)
        rows = shape[-2]
        return self._decode(place.tensor, place.matrix * rows, (place.matrix + 1) * rows)

    def read_slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries start:stop of axis 0 in float32; decodes no more than these."""
        place = self.tensors[name]
        shape = place.tensor.shape
        if place.matrix is not None or len(shape) < 2:
            return self.read(name)[start:stop]
        per_entry = _rows(shape[1:])
        rows = self._decode(place.tensor, start * per_entry, stop * per_entry)
        return rows.reshape(stop - start, *shape[1:])

    def _decode(self, tensor: GGUFTensor, start: int, stop: int) -> torch.Tensor:
        """Rows start:stop as float32 (rows, cols); all leading axes count as rows."""
        row_bytes = tensor.nbytes // _rows(tensor.shape)
        data = self._file.read(tensor.name, start * row_bytes, stop * row_bytes)
        qtype = GGMLQuantizationType[tensor.qtype]
        values = dequantize(data.reshape(stop - start, row_bytes), qtype)
        return torch.from_numpy(np.array(values, dtype=np.float32))


def _rows(shape: tuple[int, ...]) -> int:
    """Rows of a tensor, all leading axes flattened; a vector is one row."""
    rows = 1
    for axis in shape[:-1]:
        rows *= axis
    return rows


def _found(file: GGUFFile, spec: TensorSpec) -> str:
    tensor = file.tensors.get(spec.name)
    return "missing" if tensor is None else f"{tensor.shape} in the file"
