"""`describe_gguf`: from a GGUF file's header to the `ModelSpec` of the checkpoint behind it.

Owns: finding the family, rebuilding its configuration from keys and tensors, and accounting for
every tensor both ways: each row of the family is in the file with its shape, and each tensor in the
file is a row's. Leaves out: the inverse of each family's keys (its file), and weights; of these
only `rope_freqs.weight` is read.

The sources of the tensors are the names that the family's checkpoints have, with "model." before
"layers.", so that whatever runs a checkpoint runs the file, too. Experts in banks count as the
tensor that they stand for, and so do the two halves of a tensor that llama.cpp takes whole or in
two (Gemma 4's `ffn_gate_up_exps`). What the keys do not tell and llama.cpp's graph has fixed is
taken from transformers' defaults.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from moequant.architectures.config import readable, text_config
from moequant.architectures.expand import Accounts, expand, model_spec
from moequant.architectures.family import Family, Layout
from moequant.architectures.file_keys import FileKeys, Shapes
from moequant.architectures.spec import ModelSpec, TensorSpec
from moequant.architectures.table import FAMILIES, family_named
from moequant.errors import ArchitectureError, CheckpointError, GGUFError, listing
from moequant.expert_banks import is_bank_part, read_banks
from moequant.gguf_file import GGUFFile

PREFIX = "model."
_FLOATS = {"F32": "<f4", "F16": "<f2"}


def describe_gguf(file: GGUFFile) -> ModelSpec:
    """The model in `file`, after checking every tensor's name and shape against its metadata.

    Raises:
        ArchitectureError: a family that is not served, or a variant of one.
        GGUFError: keys missing or contradictory, damaged expert banks, or tensors missing, of the
            wrong shape, or nobody's; all tensors at fault are listed.
    """
    family = _family(file)
    shapes = logical_shapes(file)
    keys = FileKeys(
        origin=str(file.path),
        architecture=family.architecture,
        metadata=file.metadata,
        shapes=shapes,
        values=lambda name: _floats(file, name),
    )
    origin = f"{file.path}: metadata"
    try:
        with readable(origin):
            config = text_config(family.config_of(keys), family, origin)
            layout = family.layout(config, _checkpoint_names(family, shapes))
    except CheckpointError as error:
        raise GGUFError(str(error)) from error
    accounts = Accounts()
    tensors = tuple(expand(family, layout, PREFIX, "", accounts))
    wanted = dict(_as_stored(tensors, shapes))
    _explain_halves(tensors, shapes, accounts)
    offenders = [*_missing(wanted, shapes), *_unexpected(wanted, shapes, accounts)]
    offenders += _experts(family, layout, tensors)
    if offenders:
        raise GGUFError(
            f"{file.path}: {len(offenders)} tensors are not what its metadata describe:"
            + listing(offenders)
        )
    left_out = tuple(name for name in shapes if name in accounts.unused_gguf)
    return model_spec(family, layout, config, tensors, left_out, PREFIX)


def logical_shapes(file: GGUFFile) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor, with expert banks as the one tensor that they stand for.

    Raises:
        GGUFError: damaged banks (see `read_banks`).
    """
    shapes = {name: t.shape for name, t in file.tensors.items() if not is_bank_part(name)}
    return shapes | {name: banks.shape for name, banks in read_banks(file).items()}


def _family(file: GGUFFile) -> Family:
    architecture = file.metadata.get("general.architecture")
    kind = file.metadata.get("general.type", "model")
    served = ", ".join(family.architecture for family in FAMILIES)
    if kind != "model":
        raise GGUFError(f"{file.path}: general.type is {kind!r:.80}; a model is needed.")
    if architecture not in {family.architecture for family in FAMILIES}:
        raise ArchitectureError(
            f"{file.path}: architecture {architecture!r:.80} is not supported. It can be: {served}."
        )
    return family_named(architecture)


def _floats(file: GGUFFile, name: str) -> npt.NDArray[np.float32]:
    tensor = file.tensors[name]
    if tensor.qtype not in _FLOATS:
        raise GGUFError(f"{file.path}: {name} is {tensor.qtype}, expected {' or '.join(_FLOATS)}.")
    values: npt.NDArray[np.float32] = file.read(name).view(_FLOATS[tensor.qtype]).astype(np.float32)
    return values


def _checkpoint_names(family: Family, shapes: Shapes) -> frozenset[str]:
    """The checkpoint's names, without prefix, of the tensors in the file: what decides on rows."""
    outside = {row.gguf: row.source for row in (*family.first, *family.last)}
    inside = {row.gguf: row.source for row in family.layer}
    names = set()
    for name in shapes:
        if name in outside:
            names.add(outside[name])
        elif name.startswith("blk."):
            _, bid, rest = name.split(".", 2) if name.count(".") > 1 else ("", "", "")
            names.add(f"layers.{bid}.{inside.get(rest, rest)}")
    return frozenset(names)


def _as_stored(
    tensors: tuple[TensorSpec, ...], shapes: Shapes
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of what the file has to hold: a tensor, or its halves if one is there."""
    for tensor in tensors:
        if tensor.name in shapes or not any(half in shapes for half in tensor.halves):
            yield tensor.name, tensor.shape
        else:
            yield from ((half, tensor.half_shape) for half in tensor.halves)


def _explain_halves(tensors: tuple[TensorSpec, ...], shapes: Shapes, accounts: Accounts) -> None:
    """Halves beside the whole are nobody's; llama.cpp, which counts tensors, refuses them, too."""
    for tensor in tensors:
        if tensor.name in shapes:
            reason = f"{tensor.name} is there, too"
            accounts.wrong_gguf.update(dict.fromkeys(tensor.halves, reason))


def _missing(wanted: Shapes, shapes: Shapes) -> Iterator[str]:
    for name, shape in wanted.items():
        found = shapes.get(name)
        if found is None:
            yield f"{name}: missing, of shape {list(shape)}"
        elif found != shape:
            yield f"{name}: shape {list(found)}, expected {list(shape)}"


def _unexpected(wanted: Shapes, shapes: Shapes, accounts: Accounts) -> Iterator[str]:
    """Tensors that no row asks for; those that llama.cpp, too, passes over are none."""
    known = set(wanted) | accounts.unused_gguf
    for name in shapes:
        if name not in known:
            reason = accounts.wrong_gguf.get(name)
            yield f"{name}: unexpected" + (f" ({reason})" if reason else "")


def _experts(family: Family, layout: Layout, tensors: tuple[TensorSpec, ...]) -> Iterator[str]:
    """What is wrong with the number of experts."""
    if not any(tensor.is_expert for tensor in tensors):
        return
    count, used = layout.expert_count, layout.expert_used_count
    if not 1 <= used <= count:
        arch = family.architecture
        yield f"{arch}.expert_used_count is {used}, {arch}.expert_count {count}"
