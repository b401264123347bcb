"""Rewrites GGUF files with gguf-py's reader and writer: split, with other tensors, with other keys.

Owns: copying. What gguf-py writes is nobody's work here, so that our reader is held against it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

Value = tuple[np.ndarray, GGMLQuantizationType]


def rewrite(
    source: Path,
    target: Path,
    *,
    tensors: Mapping[str, Value | None] | None = None,
    keys: Mapping[str, Any] | None = None,
    split_max_tensors: int = 0,
    small_first_shard: bool = False,
) -> None:
    """Copy `source` to `target`, or to `target`'s shards.

    `tensors`: name → (bytes or values, type) to add or replace, None to drop. `keys`: name → value,
    a whole number as UINT32, None to drop.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(
        target,
        architecture,
        split_max_tensors=split_max_tensors,
        small_first_shard=small_first_shard,
    )
    _copy_keys(reader, writer, dict(keys or {}))
    changes = dict(tensors or {})
    for tensor in reader.tensors:
        if tensor.name not in changes:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, value in changes.items():
        if value is not None:
            writer.add_tensor(name, value[0], raw_dtype=value[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_keys(reader: gguf.GGUFReader, writer: gguf.GGUFWriter, changes: dict[str, Any]) -> None:
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in changes:
            continue
        kind = field.types[0]
        item = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, item)
    for name, value in changes.items():
        if value is None:
            continue
        kind = GGUFValueType.UINT32 if type(value) is int else GGUFValueType.get_type(value)
        writer.add_key_value(name, value, kind)


def split(source: Path, folder: Path, tensors: int, **options: bool) -> Path:
    """Shards of `source` with at most `tensors` tensors each, in `folder`; gives the first."""
    folder.mkdir(exist_ok=True)
    rewrite(source, folder / "model.gguf", split_max_tensors=tensors, **options)  # type: ignore[arg-type]
    return min(folder.glob("model-00001-of-*.gguf"))
