"""What can be measured: a checkpoint, or a GGUF file taken from its own metadata.

Owns: opening either as weights, a description and a tokenizer, and the checks that two of them are
one model. Leaves out: reading (`checkpoint`, `gguf_file`, `architectures`), measuring (`compare`).

A GGUF file is described by its own keys, not by the checkpoint it is held against, so that an error
in its metadata shows in what is measured, as it would in llama.cpp.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from moequant.architectures import ModelSpec, describe, describe_gguf
from moequant.calibrate.weights import WeightSource
from moequant.calibrate.windows import load_tokenizer
from moequant.checkpoint import Checkpoint, open_checkpoint
from moequant.errors import GGUFError, listing
from moequant.evaluate.gguf_tokenizer import gguf_tokenizer
from moequant.evaluate.gguf_weights import GGUFWeights, stored
from moequant.gguf_file import GGUFFile, is_gguf, read_model
from moequant.parameters import count_parameters


@dataclass(frozen=True)
class MeasuredModel:
    """A model under measurement.

    `weights` serve tensors under the names that `spec` has as sources. `nbytes` are those of all
    tensors as they are stored. `qtypes` has the type and bytes of each GGUF tensor, empty for
    what is no GGUF file. `origin` is the checkpoint or file behind it.
    """

    name: str
    weights: WeightSource
    spec: ModelSpec
    nbytes: int
    tokenizer: Callable[[], Any]
    qtypes: dict[str, tuple[str, int]]
    origin: Checkpoint | GGUFFile

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors."""
        sizes = ((t.name, prod(t.shape)) for t in self.spec.tensors)
        counts = self.spec.expert_count, self.spec.expert_used_count
        return 8 * self.nbytes / max(1, count_parameters(sizes, *counts).total)


def open_reference(source: str) -> MeasuredModel:
    """A GGUF file, or else a checkpoint folder or Hugging Face id."""
    path = Path(source)
    return open_file(path) if path.is_file() else of_checkpoint(open_checkpoint(source))


def of_checkpoint(checkpoint: Checkpoint) -> MeasuredModel:
    """The model in a checkpoint that is already open."""
    spec = describe(checkpoint)
    infos = (checkpoint.tensors[name] for tensor in spec.tensors for name in tensor.sources)
    return MeasuredModel(
        name=checkpoint.name,
        weights=checkpoint,
        spec=spec,
        nbytes=sum(info.stop - info.start for info in infos),
        tokenizer=partial(load_tokenizer, checkpoint.path),
        qtypes={},
        origin=checkpoint,
    )


def open_file(path: Path) -> MeasuredModel:
    """The model in a GGUF file, ours or not; the first of several if it is split.

    Raises GGUFError for a file that is damaged or no model, ArchitectureError for a family that is
    not served.
    """
    if not is_gguf(path):
        raise GGUFError(_why_no_model(path))
    file = read_model(path)
    spec = describe_gguf(file)
    return MeasuredModel(
        name=path.name,
        weights=GGUFWeights(file, spec),
        spec=spec,
        nbytes=sum(tensor.nbytes for tensor in file.tensors.values()),
        tokenizer=partial(gguf_tokenizer, file),
        qtypes=stored(file, spec),
        origin=file,
    )


def _why_no_model(path: Path) -> str:
    if not path.exists():
        return f"{path}: no such file."
    if path.is_dir():
        return f"{path} is a folder; name a GGUF file. (A checkpoint can be the --reference.)"
    if path.suffix in (".safetensors", ".json"):
        return f"{path} is not a GGUF file; of a checkpoint, name the folder {path.parent}."
    return f"{path} is not a GGUF file."


def check_same_model(model: MeasuredModel, reference: MeasuredModel) -> None:
    """GGUFError, with every difference, unless both have one vocabulary and one set of shapes.

    Experts may be missing from either: the dense part of an additive MoE is measured against the
    whole.
    """
    ours, theirs = model.spec, reference.spec
    different = [
        f"{what}: {getattr(ours, what)} in the file, {getattr(theirs, what)} in the reference"
        for what in ("architecture", "block_count", "hidden_size", "vocab_size")
        if getattr(ours, what) != getattr(theirs, what)
    ]
    shapes = {tensor.name: tensor.shape for tensor in theirs.tensors}
    different += [
        f"{tensor.name}: {list(tensor.shape)} in the file, {list(shapes[tensor.name])} in the "
        "reference"
        for tensor in ours.tensors
        if tensor.name in shapes and shapes[tensor.name] != tensor.shape
    ]
    if different:
        raise GGUFError(
            f"{model.name} is not a file of the model {reference.name}:{listing(different)}\n"
            "Name the checkpoint that the file was made of."
        )
