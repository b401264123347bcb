"""Reads the header of a GGUF file: metadata and where each tensor lies, every length checked.

Owns: the container format, and models that are split into several files. Leaves out: what keys
mean, and turning bytes into values. `gguf`'s own reader trusts the counts in a file, so that a
damaged one makes it loop or allocate without end; this one checks each count against the bytes that
are left, and says what is wrong.

A split model is files named `NAME-00001-of-00003.gguf`, each with `split.no` (from 0),
`split.count` and `split.tensors.count` (of all files); the first holds all other metadata.

Source: docs/gguf.md of ggml (format version 3; version 2 has the same layout); for splits
`src/llama-model-loader.cpp` of llama.cpp.
"""

import itertools
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from moequant.errors import GGUFError, listing

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_NAME = 1 << 16  # bytes; real names are under 100
SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
HEADER_LIMIT = 1 << 30  # bytes of header that are read; a 262144-token vocabulary takes 16 MB

_SCALARS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h", GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f", GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d", GGUFValueType.BOOL: "?",
}  # fmt: skip


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: `shape` in torch order (rows before columns), bytes at `start` of file `path`."""

    name: str
    qtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    path: Path


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file's header. `metadata` values are Python scalars, strings and lists.

    `shards` are the files of a split model, `path` the first of them; empty for a single file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    shards: tuple[Path, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the file, or of all files of a split model, headers included."""
        return sum(path.stat().st_size for path in self.shards or (self.path,))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """Bytes `start:stop` of a tensor's data, shape (stop - start,)."""
        tensor = self.tensors[name]
        length = (tensor.nbytes if stop is None else stop) - start
        try:
            with tensor.path.open("rb") as file:
                file.seek(tensor.start + start)
                data = np.fromfile(file, np.uint8, length)
        except OSError as error:
            raise GGUFError(f"{tensor.path}: {error.strerror or error}.") from error
        if len(data) != length:
            raise GGUFError(f"{tensor.path}: {name} ends {length - len(data)} bytes early.")
        return data

    def chunks(self, name: str, size: int = 1 << 24) -> Iterator[npt.NDArray[np.uint8]]:
        """A tensor's bytes in order, at most `size` at a time."""
        nbytes = self.tensors[name].nbytes
        for start in range(0, nbytes, size):
            yield self.read(name, start, min(start + size, nbytes))


def is_gguf(path: Path) -> bool:
    """True if `path` is a file that starts with GGUF's magic; GGUFError if it cannot be read."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise GGUFError(f"{path}: {error.strerror or error}.") from error


def read_model(path: Path) -> GGUFFile:
    """The header of a model: of the file `path` or, where it is split, of it and all its shards.

    Raises:
        GGUFError: as `read_gguf`; a shard that is not the first, is missing or is of another
            model; a tensor in two shards; more or fewer tensors than the first shard announces.
    """
    first = read_gguf(path)
    count = _split_number(first, SPLIT_COUNT, default=1)
    if count <= 1:
        return first
    shards = [first, *_further_shards(first, count)]
    tensors: dict[str, GGUFTensor] = {}
    for shard in shards:
        twice = [f"{n}: also in {tensors[n].path.name}" for n in shard.tensors if n in tensors]
        if twice:
            raise GGUFError(f"{shard.path} has tensors of another shard:{listing(twice)}")
        tensors |= shard.tensors
    announced = _split_number(first, SPLIT_TENSORS)
    if len(tensors) != announced:
        raise GGUFError(
            f"{path}: {SPLIT_TENSORS} is {announced}, but its {count} shards hold {len(tensors)} "
            "tensors; they belong to different models."
        )
    return replace(first, tensors=tensors, shards=tuple(shard.path for shard in shards))


def _further_shards(first: GGUFFile, count: int) -> Iterator[GGUFFile]:
    """All shards but the first, each checked against it."""
    number = _split_number(first, SPLIT_NO)
    named = SPLIT_NAME.fullmatch(first.path.name)
    if named is None or int(named[3]) != count or int(named[2]) != number + 1:
        raise GGUFError(
            f"{first.path} is shard {number + 1} of {count} of a split model, so its name must "
            f"end in -{number + 1:05d}-of-{count:05d}.gguf."
        )
    paths = [first.path.with_name(f"{named[1]}-{n + 1:05d}-of-{count:05d}.gguf")
             for n in range(count)]  # fmt: skip
    if number != 0:
        raise GGUFError(
            f"{first.path} is shard {number + 1} of {count}; give the first: {paths[0]}"
        )
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise GGUFError(
            f"{first.path}: {len(missing)} of {count} shards missing:{listing(missing)}"
        )
    for number, path in enumerate(paths[1:], 1):
        shard = read_gguf(path)
        for key, expected in (
            (SPLIT_COUNT, count),
            (SPLIT_NO, number),
            (SPLIT_TENSORS, _split_number(first, SPLIT_TENSORS)),
        ):
            found = _split_number(shard, key)
            if found != expected:
                raise GGUFError(
                    f"{path} is no shard of {first.path.name}: "
                    f"its {key} is {found}, not {expected}."
                )
        yield shard


def _split_number(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = file.metadata.get(key, default)
    if type(value) is not int or value < 0:
        raise GGUFError(f"{file.path}: {key} is {value!r:.80}, not a count.")
    return value


def read_gguf(path: Path) -> GGUFFile:
    """The header of the one file `path`, checked as a whole.

    Raises:
        GGUFError: not a GGUF file, a version or byte order that is not served, a count or a
            length that does not fit the file, a duplicate name, or data that is cut short.
    """
    try:
        with path.open("rb") as file:
            return _Reader(path, file).read()
    except OSError as error:
        raise GGUFError(f"{path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise GGUFError(f"{path}: a name or a string is not UTF-8 ({error.reason}).") from error


class _TensorInfo(NamedTuple):
    shape: tuple[int, ...]  # torch order
    type_id: int
    offset: int  # in the data section


class _Reader:
    """Walks a header once, front to back; `left` bytes bound every count that it meets."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = path.stat().st_size
        self.left = min(self.size, HEADER_LIMIT)

    def read(self) -> GGUFFile:
        if self.take(4) != MAGIC:
            raise GGUFError(f"{self.path} is not a GGUF file: it does not start with 'GGUF'.")
        version = self.number("I")
        if version not in VERSIONS:
            hint = " (big-endian file?)" if version > 0xFFFF else ""
            raise GGUFError(f"{self.path} has GGUF version {version}{hint}; 2 and 3 are read.")
        n_tensors, n_keys = self.number("Q"), self.number("Q")
        metadata = self.entries(n_keys, 13, "key", self.value)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise GGUFError(f"{self.path}: general.alignment is {alignment!r}, not a power of two.")
        infos = self.entries(n_tensors, 24, "tensor", self.tensor_info)
        data_start = -(-self.file.tell() // alignment) * alignment
        tensors = {name: self.locate(name, info, data_start, alignment)
                   for name, info in infos.items()}  # fmt: skip
        self.check_disjoint(tensors)
        return GGUFFile(self.path, metadata, tensors)

    def entries(self, count: int, least: int, what: str, read: Callable[[], Any]) -> dict[str, Any]:
        """`count` named entries, each of which takes `least` bytes or more."""
        self.require(count * least, f"{count} {what}s")
        found: dict[str, Any] = {}
        for _ in range(count):
            name = self.string(MAX_NAME)
            if name in found:
                raise GGUFError(f"{self.path}: {what} {name!r} stands twice.")
            found[name] = read()
        return found

    def require(self, nbytes: int, what: str) -> None:
        if nbytes > self.left:
            raise GGUFError(
                f"{self.path} is damaged or cut short: {what} need {nbytes} bytes or more at "
                f"offset {self.file.tell()}, and {self.left} are left."
            )

    def take(self, nbytes: int) -> bytes:
        self.require(nbytes, "the next values")
        self.left -= nbytes
        return self.file.read(nbytes)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self, limit: int) -> str:
        length = self.number("Q")
        if length > limit:
            raise GGUFError(f"{self.path}: a string of {length} bytes at {self.file.tell()}.")
        return self.take(length).decode("utf-8")

    def value_type(self) -> GGUFValueType:
        number = self.number("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise GGUFError(f"{self.path}: unknown value type {number}.") from None

    def value(self) -> Any:
        kind = self.value_type()
        if kind == GGUFValueType.STRING:
            return self.string(HEADER_LIMIT)
        if kind != GGUFValueType.ARRAY:
            return self.number(_SCALARS[kind])
        item, count = self.value_type(), self.number("Q")
        if item == GGUFValueType.STRING:
            self.require(8 * count, f"{count} strings")
            # errors="replace": byte-level vocabularies hold tokens that are no UTF-8 on their own
            return [self.take(self.number("Q")).decode("utf-8", "replace") for _ in range(count)]
        if item == GGUFValueType.ARRAY:
            raise GGUFError(f"{self.path}: arrays of arrays are not served.")
        code = _SCALARS[item]
        self.require(count * struct.calcsize("<" + code), f"{count} values")
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))

    def tensor_info(self) -> _TensorInfo:
        n_dimensions = self.number("I")
        if not 1 <= n_dimensions <= MAX_DIMENSIONS:
            raise GGUFError(f"{self.path}: a tensor with {n_dimensions} dimensions.")
        ne = struct.unpack(f"<{n_dimensions}Q", self.take(8 * n_dimensions))
        return _TensorInfo(tuple(reversed(ne)), self.number("I"), self.number("Q"))

    def locate(self, name: str, info: _TensorInfo, start: int, align: int) -> GGUFTensor:
        shape, offset = info.shape, info.offset
        try:
            qtype = GGMLQuantizationType(info.type_id)
        except ValueError:
            raise GGUFError(f"{self.path}: {name} has the unknown type {info.type_id}.") from None
        block_size, type_size = GGML_QUANT_SIZES[qtype]
        if shape[-1] % block_size:
            raise GGUFError(
                f"{self.path}: {name} has rows of {shape[-1]}, which {qtype.name} cannot hold."
            )
        nbytes = prod(shape) // block_size * type_size
        if offset % align or start + offset + nbytes > self.size:
            raise GGUFError(
                f"{self.path} is damaged or cut short: {name} {shape} {qtype.name} should lie at "
                f"bytes {start + offset} to {start + offset + nbytes}, the file has {self.size}."
            )
        return GGUFTensor(name, qtype.name, shape, start + offset, nbytes, self.path)

    def check_disjoint(self, tensors: dict[str, GGUFTensor]) -> None:
        ordered = sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.nbytes))
        for before, after in itertools.pairwise(ordered):
            if before.start + before.nbytes > after.start:
                raise GGUFError(f"{self.path}: {before.name} and {after.name} overlap.")
