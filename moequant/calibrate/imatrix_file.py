"""The imatrix file: GGUF as llama-imatrix writes it, with further tensors beside.

Owns: writing it, and reading files of ours or llama-imatrix's with every size checked first. Leaves
out: what the numbers mean (`imatrix`).

Layout: keys general.type = "imatrix", imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size;
per weight `<name>.in_sum2` (n_matrices, columns) and `<name>.counts` (n_matrices, 1), both F32.
Ours adds `<name>.gate_in_sum2`, `.gate_counts`, `.near_miss_in_sum2`, `.near_miss_counts` and
`.near_miss_gate_counts` for experts, and `moequant.*` keys. llama.cpp's loader
(`common/imatrix-loader.cpp`) takes the suffixes ".in_sum2" and ".counts", dot included, and passes
over every other tensor; it needs the three `imatrix.*` keys.

llama-quantize reads the plain sums: no gate weighting, no near misses, and for an expert without
tokens it takes ones. `Imatrix.importance` has the better numbers.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import gguf
import numpy as np

from moequant.calibrate.imatrix import Floats, Imatrix, MatrixStatistics
from moequant.errors import GGUFError, ImatrixError, listing
from moequant.files import replacing
from moequant.gguf_file import GGUFFile, is_gguf, read_gguf

_COLUMN_PARTS = ("in_sum2", "gate_in_sum2", "near_miss_in_sum2")
_COUNT_PARTS = ("counts", "gate_counts", "near_miss_counts", "near_miss_gate_counts")
_PARTS = _COLUMN_PARTS + _COUNT_PARTS
_INT_END = 1 << 63


class _Writer(gguf.GGUFWriter):  # type: ignore[misc]
    """An imatrix file names no architecture."""

    def add_architecture(self) -> None:
        """Nothing, unlike a model file."""


def write_imatrix(imatrix: Imatrix, path: Path) -> None:
    """Write the file whole or not at all; raises ExportError."""
    with replacing(path) as temporary:
        _write(imatrix, temporary)


def _write(imatrix: Imatrix, path: Path) -> None:
    writer = _Writer(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", imatrix.datasets)
    writer.add_uint32("imatrix.chunk_count", imatrix.chunk_count)
    writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size)
    for key, value in sorted(imatrix.metadata.items()):
        _add(writer, key, value)
    for name, entry in sorted(imatrix.entries.items()):
        for part in _PARTS:
            values = getattr(entry, part)
            if values is not None:
                shaped = values if part in _COLUMN_PARTS else values[:, None]
                writer.add_tensor(f"{name}.{part}", np.ascontiguousarray(shaped, np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    match value:
        case str():
            writer.add_string(key, value)
        case int():
            writer.add_uint64(key, value)
        case float():
            writer.add_float64(key, value)
        case _:
            raise TypeError(f"{key}: {type(value).__name__} has no place in the file")


def read_imatrix(path: Path) -> Imatrix:
    """Read an imatrix GGUF; raises ImatrixError for anything else or anything damaged in it."""
    try:
        if path.is_file() and not is_gguf(path):
            raise ImatrixError(
                f"{path}: not a GGUF file; llama-imatrix's old .dat format is not read, convert it "
                "with `llama-imatrix --in-file OLD -o NEW.gguf`"
            )
        file = read_gguf(path)
        kind = file.metadata.get("general.type")
        if kind != "imatrix":
            raise ImatrixError(f"{path}: general.type is {kind!r}, not 'imatrix'")
        return _imatrix(file, _statistics(file))
    except GGUFError as error:
        raise ImatrixError(str(error)) from error
    except OSError as error:
        raise ImatrixError(f"{path}: cannot be read: {error.strerror or error}") from error


def _statistics(file: GGUFFile) -> dict[str, dict[str, Floats]]:
    """The parts of every entry; other tensors are passed over, as llama.cpp does."""
    parts: dict[str, dict[str, Floats]] = {}
    wrong = []
    for full_name, tensor in file.tensors.items():
        name, _, part = full_name.rpartition(".")
        if part not in _PARTS:
            continue
        if tensor.qtype != "F32" or tensor.nbytes == 0:
            wrong.append(f"{full_name} is {tensor.qtype} of {tensor.nbytes} bytes, F32 is needed")
            continue
        values = file.read(full_name).view("<f4").astype(np.float32)
        parts.setdefault(name, {})[part] = values.reshape(tensor.shape)
    wrong += [text for name, found in parts.items() for text in _faults(name, found)]
    if wrong:
        raise ImatrixError(f"{file.path}: damaged statistics:{listing(wrong)}")
    if not parts:
        raise ImatrixError(f"{file.path}: no statistics in it")
    return parts


def _imatrix(file: GGUFFile, parts: dict[str, dict[str, Floats]]) -> Imatrix:
    keys = file.metadata
    return Imatrix(
        entries={name: _entry(found) for name, found in parts.items()},
        datasets=[text for text in _list(keys.get("imatrix.datasets")) if isinstance(text, str)],
        chunk_count=_count(keys.get("imatrix.chunk_count")),
        chunk_size=_count(keys.get("imatrix.chunk_size")),
        metadata=_metadata(file),
    )


def _metadata(file: GGUFFile) -> dict[str, str | int | float]:
    """The `moequant.*` keys whose values we could have written, floor and kappa checked."""
    floor, kappa = (file.metadata.get(f"moequant.calibration.{n}", 0) for n in ("floor", "kappa"))
    if isinstance(floor, bool) or not isinstance(floor, int) or not 0 <= floor < _INT_END:
        raise ImatrixError(f"{file.path}: moequant.calibration.floor is {floor!r}, not a count")
    if isinstance(kappa, bool) or not isinstance(kappa, int | float) or not _is_amount(kappa):
        raise ImatrixError(
            f"{file.path}: moequant.calibration.kappa is {kappa!r}, not a finite number >= 0"
        )
    return {
        key: value
        for key, value in file.metadata.items()
        if key.startswith("moequant.") and _writable(value)
    }


def _is_amount(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _writable(value: object) -> TypeGuard[str | int | float]:
    """Whether `_add` takes it, and a reader of any kind of integers does."""
    match value:
        case bool():
            return False
        case str():
            return True
        case int():
            return 0 <= value < _INT_END
        case float():
            return math.isfinite(value)
    return False


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _faults(name: str, found: dict[str, Floats]) -> Iterator[str]:
    """What is wrong with the parts of one entry."""
    if "in_sum2" not in found or "counts" not in found:
        yield f"{name} has {', '.join(found)} only"
        return
    for part, values in found.items():
        bad = int((~np.isfinite(values) | (values < 0)).sum())
        if bad:
            yield f"{name}.{part}: {bad} of {values.size} values are negative or not finite"
        like = found["in_sum2"] if part in _COLUMN_PARTS else found["counts"]
        if values.size != like.size:
            yield f"{name}.{part} has {values.size} values, {like.size} are expected"
    if found["in_sum2"].size % found["counts"].size:
        yield f"{name}: {found['in_sum2'].size} sums do not divide into {found['counts'].size}"


def _entry(found: dict[str, Floats]) -> MatrixStatistics:
    n_matrices = found["counts"].size
    shaped = {
        part: values.reshape((n_matrices, -1) if part in _COLUMN_PARTS else -1)
        for part, values in found.items()
    }
    return MatrixStatistics(**shaped)
