"""Writes a GGUF file tensor by tensor, under a temporary name, and checks it before renaming.

Owns: the order header, tensors, sync, read back, rename; and that nothing half-written ever stands
under the final name. Leaves out: how values become bytes, and which metadata there is.

The header (magic, keys, tensor infos) is written by `gguf.GGUFWriter`; the data follows here, in
pieces, since that writer wants each tensor whole.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from moequant.errors import ExportError, GGUFError, listing
from moequant.files import replacing
from moequant.gguf_file import read_gguf

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
Piece = bytes | memoryview


@dataclass(frozen=True)
class MetadataEntry:
    """One key of a GGUF file with its value and value type (`sub_type` for arrays)."""

    key: str
    value: Any
    type: gguf.GGUFValueType
    sub_type: gguf.GGUFValueType | None = None


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor's place in the file: `shape` in torch order, `nbytes` of data to come."""

    name: str
    shape: tuple[int, ...]
    qtype: str
    nbytes: int


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Sequence[MetadataEntry],
    tensors: Sequence[TensorToWrite],
    pieces: Callable[[TensorToWrite], Iterable[Piece]],
) -> None:
    """Write `path` whole or not at all.

    `pieces(tensor)` yields the tensor's bytes in order, in pieces of any size; it is called once
    for each tensor, in order. What it yields is hashed, and compared with what the finished file
    gives when it is read back from disk.

    Raises:
        ExportError: the disk is full, the place is not writable, pieces of the wrong length, or
            the file read back differs from what was packed.
    """
    with replacing(path) as temporary:
        _write_header(temporary, architecture, metadata, tensors)
        with temporary.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            hashes = [_write_tensor(file, tensor, pieces(tensor)) for tensor in tensors]
            _sync(file)
        _check(temporary, tensors, hashes)


def _write_header(
    path: Path,
    architecture: str,
    metadata: Sequence[MetadataEntry],
    tensors: Sequence[TensorToWrite],
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for entry in metadata:
        if entry.key != "general.architecture":  # GGUFWriter has written it by itself
            writer.add_key_value(entry.key, entry.value, entry.type, entry.sub_type)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),  # not used: the raw type below decides
            tensor.nbytes,
            raw_dtype=gguf.GGMLQuantizationType[tensor.qtype],
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _write_tensor(file: BinaryIO, tensor: TensorToWrite, pieces: Iterable[Piece]) -> bytes:
    """Append a tensor at the next aligned offset; returns the hash of its bytes."""
    file.write(bytes(-file.tell() % ALIGNMENT))
    digest, written = hashlib.blake2b(), 0
    for piece in pieces:
        file.write(piece)
        digest.update(piece)
        written += len(piece)
    if written != tensor.nbytes:
        raise ExportError(
            f"{tensor.name} was packed into {written} bytes; {tensor.qtype} {tensor.shape} takes "
            f"{tensor.nbytes}. This is a bug in moequant; please report it."
        )
    # llama.cpp wants the data section padded to its alignment, past the last tensor too
    file.write(bytes(-file.tell() % ALIGNMENT))
    return digest.digest()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):  # so that the check below reads the disk, not the page cache
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _check(path: Path, tensors: Sequence[TensorToWrite], hashes: Sequence[bytes]) -> None:
    """Read the file back with the strict reader and compare each tensor with what was packed."""
    try:
        found = read_gguf(path)
    except GGUFError as error:
        raise ExportError(f"what was written cannot be read back: {error}") from error
    wrong = []
    for tensor, expected in zip(tensors, hashes, strict=True):
        digest = hashlib.blake2b()
        for chunk in found.chunks(tensor.name):
            digest.update(chunk.data)
        placed = found.tensors[tensor.name]
        if digest.digest() != expected or (placed.shape, placed.qtype) != (
            tensor.shape,
            tensor.qtype,
        ):
            wrong.append(f"{tensor.name} ({tensor.qtype} {tensor.shape})")
    if wrong:
        raise ExportError(
            "the file read back differs from what was packed; the disk or memory is failing, and "
            f"nothing was kept:{listing(wrong)}"
        )
