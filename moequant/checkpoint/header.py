"""The safetensors header, read by our own parser and checked before any byte of data.

Layout of a file: 8 bytes little-endian length n, n bytes of JSON, then the data. The JSON is one
object, tensor name -> {"dtype", "shape", "data_offsets": [begin, end)}, offsets counted from the
end of the header, plus an optional "__metadata__" of strings.

Owns: the verdict on a header. Whatever safetensors' Rust reader refuses is refused here; the tests
hold the two against each other. Stricter than it in these points, each a sign of a file that was
tampered with or that torch could not hold:
  1. a key that occurs twice (Rust: the last one wins);
  2. an entry, or a dtype, in serde's alternative spelling (a list of fields; {"F32": null});
  3. a dtype torch lacks (F6), or an F4 tensor whose last axis is odd;
  4. axes whose product, zeros left out, does not fit 63 bits.
Leaves out: reading data (`reader`) and how shards fit together (`folder`).
"""

import json
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moequant.checkpoint.dtypes import BITS, TORCH_DTYPES

MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
_MAX_FIELD_DEPTH = 125  # serde_json stops at 127 levels; an entry's fields are on the second
_PICKLE = "a pickle file under a safetensors name; loading pickle runs code, so it is refused"
_OTHER_FORMATS = (
    (b"version ", "a Git LFS pointer, not the weights themselves; run `git lfs pull`"),
    (b"GGUF", "a GGUF file under a safetensors name; GGUF is moequant's output, not its input"),
    (b"PK\x03\x04", _PICKLE),
    (b"\x80", _PICKLE),
)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


Stamp = tuple[int, int]
"""A file's size in bytes and its time of change in ns."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    `shape` is torch's, outermost axis first. `start` and `stop` are byte offsets into `file`,
    counted from its beginning.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """A header that passed: its tensors in the file's byte order, and its JSON as it was read.

    `stamp` is the file's, to notice later that it changed.
    """

    tensors: tuple[TensorInfo, ...]
    raw: bytes
    stamp: Stamp


class BadFileError(Exception):
    """What is wrong with one file; `folder` turns these into a `CheckpointError`."""


@dataclass(frozen=True)
class _Entry:
    """One tensor's entry with its fields checked; offsets still count from the header's end."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def stamp(state: os.stat_result) -> Stamp:
    return state.st_size, state.st_mtime_ns


def printable(name: str, limit: int = 200) -> str:
    """A name from a file, made safe to print: no control characters, not endless."""
    text = name if name.isprintable() and name else repr(name)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(name)} characters)"


def os_reason(error: OSError) -> str:
    """The system's reason in a few words, without the path that the caller prints anyway."""
    return (error.strerror or type(error).__name__).lower()


def open_regular(path: Path) -> int:
    """A read-only file descriptor; `BadFileError` for what is missing, locked or not a file."""
    try:
        if path.is_symlink() and not path.exists():
            raise BadFileError(
                f"a link to {path.readlink()}, which is not there; download the checkpoint again"
            )
        if not stat.S_ISREG(path.stat().st_mode):  # before opening: a pipe would block
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise BadFileError(f"{kind}, where a file is expected")
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise BadFileError("missing; download the checkpoint again") from error
    except PermissionError as error:
        raise BadFileError("may not be read by this user; change its permissions") from error
    except OSError as error:
        raise BadFileError(f"cannot be opened: {os_reason(error)}") from error


def read_header(path: Path, problems: list[str]) -> Header | None:
    """One shard's header, checked; or None, and what is wrong appended to `problems`.

    Reads the header's bytes only.
    """
    try:
        raw, state = _read_raw(path)
        base = LENGTH_BYTES + len(raw)
        data_bytes = state.st_size - base
        entries, faults = _entries(_parse(raw))
        faults += _layout_faults(entries, data_bytes) if not faults else []
    except BadFileError as error:
        faults = [str(error)]
    if faults:
        problems += [f"{path.name}: {fault}" for fault in faults]
        return None
    tensors = tuple(_tensor_info(entry, path, base) for entry in entries)
    return Header(tensors, raw, stamp(state))


def _read_raw(path: Path) -> tuple[bytes, os.stat_result]:
    """The header's JSON bytes, and the state of the file they came from."""
    fd = open_regular(path)
    try:
        state = os.fstat(fd)
        size = state.st_size
        if size < LENGTH_BYTES:
            raise BadFileError(f"{size} bytes long, too short for a header; download it again")
        first = os.pread(fd, LENGTH_BYTES, 0)
        length = int.from_bytes(first, "little")
        if length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
            raise BadFileError(_length_fault(first, length, size))
        raw = os.pread(fd, length, LENGTH_BYTES)
    except OSError as error:
        raise BadFileError(f"cannot be read: {os_reason(error)}") from error
    finally:
        os.close(fd)
    if len(raw) != length:
        raise BadFileError(f"only {len(raw)} of the header's {length} bytes could be read")
    return raw, state


def _length_fault(first: bytes, length: int, size: int) -> str:
    """What a file whose header cannot be `length` bytes long probably is."""
    for magic, kind in _OTHER_FORMATS:
        if first.startswith(magic):
            return kind
    if length > MAX_HEADER_BYTES:
        return (
            f"the header claims {length} bytes, over the format's limit of {MAX_HEADER_BYTES}; "
            "not a safetensors file, or damaged"
        )
    return (
        f"truncated: the header claims {length} bytes, but only {size - LENGTH_BYTES} follow; "
        "download it again"
    )


def _parse(raw: bytes) -> dict[str, Any]:
    """The header as an object, by serde_json's rules where Python's json is laxer."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFileError(f"the header is not UTF-8 (byte {error.start})") from error
    try:
        header = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_finite_float,
        )
        if _SURROGATE.search(text):
            json.dumps(header, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadFileError("the header escapes half a character (a lone surrogate)") from error
    except RecursionError as error:
        raise BadFileError("the header nests too deeply") from error
    except ValueError as error:
        raise BadFileError(f"the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise BadFileError(f"the header is a JSON {type(header).__name__}, not an object")
    return header


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise BadFileError(f"the header names {printable(key)} twice")
        result[key] = value
    return result


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"number out of range: {text[:40]}")
    return value


def _integer(text: str) -> int | float:
    """An int if it may be one in Rust: "-0", and what is too long, are floating point there."""
    return _finite_float(text) if text == "-0" or len(text) > 20 else int(text)


def _entries(header: dict[str, Any]) -> tuple[list[_Entry], list[str]]:
    """All entries in byte order, and all faults found in single entries."""
    entries: list[_Entry] = []
    faults: list[str] = []
    for name, fields in header.items():
        try:
            if name == "__metadata__":
                _check_metadata(fields)
            else:
                entries.append(_entry(name, fields))
        except BadFileError as fault:
            faults.append(str(fault) if name == "__metadata__" else f"{printable(name)} {fault}")
    return sorted(entries, key=lambda entry: (entry.begin, entry.end)), faults


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise BadFileError(f"__metadata__ is a {type(metadata).__name__}, not an object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            kind = type(value).__name__
            raise BadFileError(f"__metadata__[{printable(key)}] is a {kind}, not a string")


def _entry(name: str, fields: Any) -> _Entry:
    if not isinstance(fields, dict):
        raise BadFileError(f"is described by a {type(fields).__name__}, not an object")
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in fields]
    if missing:
        raise BadFileError(f"lacks {', '.join(missing)}")
    for key, value in fields.items():
        if _depth(value) > _MAX_FIELD_DEPTH:
            raise BadFileError(f"has a field {printable(key)} that nests too deeply")
    dtype = _dtype(fields["dtype"])
    shape = _sizes("shape", fields["shape"])
    offsets = _sizes("data_offsets", fields["data_offsets"])
    if len(offsets) != 2:
        raise BadFileError(f"has {len(offsets)} data_offsets, not 2")
    entry = _Entry(name, dtype, shape, *offsets)
    _check_extent(entry)
    return entry


def _depth(value: Any) -> int:
    """How deeply lists and objects nest; 0 for a scalar."""
    level, depth = [value], 0
    while level:
        inner: list[Any] = []
        for item in level:
            inner += item.values() if isinstance(item, dict) else []
            inner += item if isinstance(item, list) else []
        depth += any(isinstance(item, dict | list) for item in level)
        level = inner
    return depth


def _dtype(dtype: Any) -> str:
    if not isinstance(dtype, str) or dtype not in BITS:
        raise BadFileError(f"has unknown dtype {printable(str(dtype))}; known: {', '.join(BITS)}")
    if dtype not in TORCH_DTYPES:
        raise BadFileError(
            f"has dtype {dtype}, which torch {torch.__version__} cannot hold; "
            f"store it as one of {', '.join(TORCH_DTYPES)}"
        )
    return dtype


def _sizes(field: str, values: Any) -> tuple[int, ...]:
    """A list of unsigned 64-bit integers; `True` is none, although Python says it is an int."""
    if not isinstance(values, list):
        raise BadFileError(f"has {field} of type {type(values).__name__}, not a list")
    for value in values:
        if type(value) is not int or not 0 <= value < 2**64:
            shown = printable(str(value), 40)
            raise BadFileError(f"has {shown} in its {field}, not an unsigned 64-bit integer")
    return tuple(values)


def _check_extent(entry: _Entry) -> None:
    """begin <= end, no overflow, and end - begin is what dtype and shape need."""
    shape, size = list(entry.shape), entry.end - entry.begin
    shown, nonzero = _shortened(shape), 1
    if size < 0:
        raise BadFileError(f"ends before it begins: data_offsets [{entry.begin}, {entry.end}]")
    for axis in shape:  # one by one: math.prod of a million huge axes would take hours
        nonzero *= axis or 1
        if nonzero >= 2**63:
            raise BadFileError(f"has shape {shown}, whose product overflows")
    bits = 0 if 0 in shape else nonzero * BITS[entry.dtype]
    if bits >= 2**64:
        raise BadFileError(f"has shape {shown} in {entry.dtype}, whose size overflows")
    if bits % 8 or (entry.dtype == "F4" and (not shape or shape[-1] % 2)):
        raise BadFileError(f"has shape {shown} in {entry.dtype}, which does not fill whole bytes")
    if bits // 8 != size:
        raise BadFileError(
            f"says {size} bytes in data_offsets [{entry.begin}, {entry.end}], "
            f"but {entry.dtype} {shown} takes {bits // 8}"
        )


def _shortened(shape: list[int]) -> str:
    return str(shape) if len(shape) <= 8 else f"{shape[:8]} … ({len(shape)} axes)"


def _layout_faults(entries: list[_Entry], data_bytes: int) -> list[str]:
    """Every gap, overlap and overrun of tensors in byte order over `data_bytes` of data."""
    faults, position, before = [], 0, "the header"
    for entry in entries:
        place = f"{printable(entry.name)} [{entry.begin}, {entry.end}]"
        if entry.begin > position:
            faults.append(f"{entry.begin - position} bytes between {before} and {place} are unused")
        elif entry.begin < position:
            faults.append(f"{place} overlaps {before} by {position - entry.begin} bytes")
        position, before = max(position, entry.end), place
    past = [entry for entry in entries if entry.end > data_bytes]
    if past:
        faults.append(
            f"truncated: the header describes {position} bytes of data, the file has {data_bytes}; "
            f"{len(past)} tensors are cut off, first {printable(past[0].name)}; download it again"
        )
    elif position < data_bytes:
        faults.append(
            f"{data_bytes - position} bytes after the last tensor belong to none "
            f"(data described: {position}, in the file: {data_bytes})"
        )
    return faults


def _tensor_info(entry: _Entry, path: Path, base: int) -> TensorInfo:
    shape = entry.shape
    if entry.dtype == "F4":  # torch counts bytes of two values
        shape = (*shape[:-1], shape[-1] // 2)
    dtype = TORCH_DTYPES[entry.dtype]
    return TensorInfo(entry.name, dtype, shape, path, base + entry.begin, base + entry.end)
