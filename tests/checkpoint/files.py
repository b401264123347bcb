"""Hand-made safetensors files and checkpoint folders, good and bad.

Owns: bytes from a header and data, with no safetensors library involved, and folders of them.
Leaves out: real models; see `tests/checkpoints.py`.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I64": 8}


def file_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; `header` is JSON text, bytes, or an object to dump."""
    if not isinstance(header, str | bytes):
        header = json.dumps(header)
    raw = header.encode("utf-8") if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensors_file(shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32") -> bytes:
    """A correct file of tensors whose bytes count 0, 1, 2 … across the whole file."""
    header, position = {}, 0
    for name, shape in shapes.items():
        size = ITEM_BYTES[dtype]
        for axis in shape:
            size *= axis
        offsets = [position, position + size]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        position += size
    return file_bytes(header, (bytes(range(256)) * (position // 256 + 1))[:position])


def write_single(folder: Path, content: bytes, config: str = '{"model_type": "x"}') -> Path:
    """A folder with config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(content)
    return folder


def write_sharded(
    folder: Path, shards: Mapping[str, bytes], weight_map: Mapping[str, str], **metadata: Any
) -> Path:
    """A folder with config.json, shards, and an index with this `weight_map`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "x"}')
    for name, content in shards.items():
        (folder / name).write_bytes(content)
    index = {"metadata": metadata, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def two_shards(folder: Path) -> Path:
    """a (2, 3) and b (4,) in the first shard, c (5, 2) in the second; all well."""
    return write_sharded(
        folder,
        {
            SHARDS[0]: tensors_file({"a": (2, 3), "b": (4,)}),
            SHARDS[1]: tensors_file({"c": (5, 2)}),
        },
        {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]},
    )
