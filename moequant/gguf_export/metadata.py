"""The GGUF keys of a model: `general.*`, `{arch}.*`, and the tokenizer's.

Owns: their values and value types. Leaves out: `moequant.*` (`provenance`), and where the
`{arch}.*` values stand in a configuration (`architectures.keys`).

Names and authors come from the model card and the folder's name by gguf's own heuristics.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFValueType

from moequant.architectures import ModelSpec, family_named
from moequant.architectures.keys import Key
from moequant.checkpoint import Checkpoint
from moequant.errors import CheckpointError
from moequant.gguf_export.tokenizer import tokenizer_metadata
from moequant.gguf_export.writer import MetadataEntry

__all__ = ["MetadataEntry", "gguf_metadata", "hyperparameters"]

PLAIN = {
    GGUFValueType.UINT32: (int,),
    GGUFValueType.INT32: (int,),
    GGUFValueType.FLOAT32: (int, float),
    GGUFValueType.BOOL: (bool,),
    GGUFValueType.STRING: (str,),
}
SAMPLING = {  # generation_config.json's names and gguf's
    "sequence": "sequence",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "temperature": "temp",
    "penalty_last_n": "penalty_last_n",
    "repetition_penalty": "penalty_repeat",
    "penalty_repeat": "penalty_repeat",  # the later of the two wins
    "mirostat": "mirostat",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}


def gguf_metadata(
    spec: ModelSpec, checkpoint: Checkpoint, *, file_type: int
) -> list[MetadataEntry]:
    """Every key that llama.cpp's converter would write; `file_type` is a `gguf.LlamaFileType`.

    Raises:
        CheckpointError: a configuration value of a type that its key cannot hold.
        TokenizerError: see `tokenizer_metadata`.
    """
    return [
        MetadataEntry("general.architecture", spec.architecture, GGUFValueType.STRING),
        MetadataEntry("general.type", "model", GGUFValueType.STRING),
        *_general(spec, checkpoint),
        MetadataEntry("general.file_type", file_type, GGUFValueType.UINT32),
        MetadataEntry(
            "general.quantization_version", gguf.GGML_QUANT_VERSION, GGUFValueType.UINT32
        ),
        *hyperparameters(spec),
        *tokenizer_metadata(spec, checkpoint),
    ]


# --- {arch}.* --------------------------------------------------------------------------------


def hyperparameters(spec: ModelSpec) -> list[MetadataEntry]:
    """The `{arch}.*` keys of the family's row; CheckpointError as for `gguf_metadata`."""
    entries = []
    for key in family_named(spec.architecture).keys:
        value = key.value(spec.config)
        if value is not None:
            entries.append(_entry(f"{spec.architecture}.{key.name}", key, value))
    return entries


def _entry(name: str, key: Key, value: Any) -> MetadataEntry:
    values = value if isinstance(value, list) else [value]
    if not all(_fits(item, key.type) for item in values):
        raise CheckpointError(f"config.json: {name} would be {value!r}, not a {key.type.name}.")
    if isinstance(value, list):
        # As gguf infers it: an array of Python integers is one of INT32.
        item = GGUFValueType.INT32 if key.type == GGUFValueType.UINT32 else key.type
        return MetadataEntry(name, value, GGUFValueType.ARRAY, item)
    return MetadataEntry(name, value, key.type)


def _fits(value: Any, kind: GGUFValueType) -> bool:
    if isinstance(value, bool) != (kind == GGUFValueType.BOOL):
        return False
    if kind == GGUFValueType.UINT32 and not (isinstance(value, int) and 0 <= value < 1 << 31):
        return False
    return isinstance(value, PLAIN[kind])


# --- general.* -------------------------------------------------------------------------------


def _general(spec: ModelSpec, checkpoint: Checkpoint) -> list[MetadataEntry]:
    """Name, author, license, size and sampling defaults, as far as the files tell.

    `gguf.Metadata` writes to a `GGUFWriter`; one without a file collects the typed entries.
    """
    writer = gguf.GGUFWriter(None, spec.architecture)
    _model_card(spec, checkpoint).set_gguf_meta_model(writer)
    entries = [
        MetadataEntry(key, value.value, value.type, value.sub_type)
        for key, value in writer.kv_data[0].items()
        if key != "general.architecture"
    ]
    return [entry for entry in entries if _is_well_typed(entry)]


def _is_well_typed(entry: MetadataEntry) -> bool:
    """False for what a card has as something else than its key is (`license: {…}`): not written."""
    if entry.type == GGUFValueType.ARRAY:
        return bool(entry.value) and all(isinstance(item, str) for item in entry.value)
    return _fits(entry.value, entry.type)


def _model_card(spec: ModelSpec, checkpoint: Checkpoint) -> Any:
    """gguf's `Metadata`, from the model card, config.json and the model's name."""
    total, shared, expert = _parameter_counts(spec)
    try:
        card = gguf.Metadata.load_model_card(checkpoint.path)
    except Exception:  # a card whose front matter is no YAML is no reason to stop
        card = {}
    metadata = gguf.Metadata.apply_metadata_heuristic(
        gguf.Metadata(), card, dict(checkpoint.config), Path(checkpoint.name), total
    )
    metadata.name = metadata.name or Path(checkpoint.name).name
    if checkpoint.part:
        metadata.name = f"{metadata.name} ({checkpoint.part})"
        metadata.size_label = None  # the whole model's, where its name or its card has one
    metadata.size_label = metadata.size_label or gguf.size_label(
        total, shared, expert, spec.expert_count
    )
    _set_sampling(metadata, checkpoint)
    return metadata


def _set_sampling(metadata: Any, checkpoint: Checkpoint) -> None:
    """Sampling defaults of generation_config.json, under the names the converter knows."""
    path = checkpoint.file("generation_config.json")
    if path is None:
        return
    try:
        generation = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # the converter, too, takes a broken one for none
    if not isinstance(generation, dict):
        return
    for name in SAMPLING:
        if generation.get(name) is not None:
            setattr(metadata, f"sampling_{SAMPLING[name]}", generation[name])


def _parameter_counts(spec: ModelSpec) -> tuple[int, int, int]:
    """All values, those outside expert stacks, and those of one expert, as gguf counts them."""
    total = shared = expert = 0
    for tensor in spec.tensors:
        size = prod(tensor.shape)
        total += size
        shared += 0 if tensor.is_expert else size
        expert += size // tensor.n_matrices if tensor.is_expert else 0
    return total, shared, expert
