"""A checkpoint folder on disk: its config, which shards hold its weights, and whether they agree.

Order in which weights are looked for, as in transformers (`_get_resolved_checkpoint_files`):
`model.safetensors` first, then `model.safetensors.index.json`. Anything else beside them, such as
Mistral's `consolidated.safetensors` or `pytorch_model.bin`, is left alone.

Owns: reading config and index, every shard's header, and one error that lists all that is wrong.
Leaves out: headers themselves (`header`), downloading (`hub`), what the tensors mean.
"""

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from moequant.checkpoint.header import (
    BadFileError,
    Header,
    Stamp,
    TensorInfo,
    open_regular,
    os_reason,
    printable,
    read_header,
)
from moequant.errors import CheckpointError, listing

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


@dataclass(frozen=True)
class Index:
    """`model.safetensors.index.json`: tensor name -> shard, relative to the folder."""

    weight_map: dict[str, str]
    total_size: Any
    raw: bytes

    @property
    def shards(self) -> list[str]:
        return sorted(set(self.weight_map.values()), key=natural_key)


@dataclass(frozen=True)
class FolderContents:
    """All that is known of a folder once its config, index and headers have passed.

    `tensors` is in natural order of the names, `stamps` per shard. `identity` is what the digest is
    taken over: the bytes of config.json, then those of the index or, without one, of the header's
    JSON. `notes` are sentences about what was passed over, for the console.
    """

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    stamps: dict[Path, Stamp]
    identity: tuple[bytes, ...]
    notes: tuple[str, ...]


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts `layers.2` before `layers.10`; numbers by length, then digits: int() has a limit."""
    parts = re.split(r"0*([0-9]+)", name)  # text and number in turn
    return [(len(part) if i % 2 else 0, part) for i, part in enumerate(parts)]


def read_folder(folder: Path) -> FolderContents:
    """Check config, index and every header of `folder`, reading no weight.

    Raises `CheckpointError` listing everything that is wrong.
    """
    names = file_names(folder)
    problems: list[str] = []
    config, raw_config = read_config(folder, names, problems)
    index = read_index(folder, names, problems)
    if index is None and SINGLE not in names:
        refuse(folder, problems)  # an index was there, but unusable
    shards = index.shards if index else [SINGLE]
    headers = {shard: read_header(folder / shard, problems) for shard in shards}
    found = [tensor for header in headers.values() if header for tensor in header.tensors]
    if index:
        problems += _disagreements(index.weight_map, headers)
    if not found and not problems:
        problems.append(f"{', '.join(shards)}: no tensor inside")
    refuse(folder, problems)
    tensors = {tensor.name: tensor for tensor in sorted(found, key=lambda t: natural_key(t.name))}
    identity = (raw_config, index.raw if index else b"".join(h.raw for h in headers.values() if h))
    stamps = {folder / shard: header.stamp for shard, header in headers.items() if header}
    return FolderContents(config, tensors, stamps, identity, tuple(_notes(names, index, found)))


def refuse(source: Path | str, problems: list[str]) -> None:
    """Raise one `CheckpointError` with all `problems`, if there are any."""
    if not problems:
        return
    if len(problems) == 1:
        raise CheckpointError(f"{source}: {problems[0]}")
    raise CheckpointError(f"{source}: {len(problems)} problems{listing(problems)}")


def read_config(
    folder: Path, names: Collection[str], problems: list[str]
) -> tuple[dict[str, Any], bytes]:
    """config.json as it is, and its bytes. Appends to `problems` what is wrong with it."""
    try:
        if CONFIG not in names:
            raise BadFileError(f"missing{_why_no_config(names)}")
        raw = _read_bytes(folder / CONFIG)
        return _json_object(raw), raw
    except BadFileError as fault:
        problems.append(f"{CONFIG}: {fault}")
        return {}, b""


def read_index(folder: Path, names: Collection[str], problems: list[str]) -> Index | None:
    """The index, or None where `model.safetensors` stands alone (it wins if both are there).

    Appends to `problems` what is wrong with the index, or why there are no weights at all.
    """
    if SINGLE in names:
        return None
    if INDEX not in names:
        problems.append(explain_no_weights(names))
        return None
    try:
        raw = _read_bytes(folder / INDEX)
        content = _json_object(raw)
        faults = _weight_map_faults(content.get("weight_map"))
    except BadFileError as fault:
        content, raw, faults = {}, b"", [str(fault)]
    problems += [f"{INDEX}: {fault}" for fault in faults]
    if faults:
        return None
    metadata = content.get("metadata")
    total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Index(content["weight_map"], total_size, raw)


def explain_no_weights(names: Iterable[str]) -> str:
    """Why files of these names are no safetensors checkpoint, and what to do about it."""
    names = sorted(names, key=natural_key)
    tensors = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.lower().endswith(_PICKLES)]
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if "adapter_model.safetensors" in tensors:
        return "holds a LoRA adapter, not a model; merge it into its base model and save that"
    if any(_SHARD.search(name) for name in tensors):
        return (
            f"{INDEX}: missing, though shards are there ({_some(tensors)}); download the index too"
        )
    if tensors:
        return f"no {SINGLE} and no {INDEX}; if {_some(tensors)} is the model, rename it {SINGLE}"
    if pickles:
        return (
            f"the weights are pickle files ({_some(pickles)}). Loading pickle runs code from the "
            "file, so it is refused; use the safetensors version of this model, or convert it on "
            "a machine you can lose: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    if ggufs:
        return (
            f"holds GGUF ({_some(ggufs)}), which is moequant's output; pass the safetensors model"
        )
    return f"no weights: neither {SINGLE} nor {INDEX} is there; is this the model's folder?"


def _why_no_config(names: Collection[str]) -> str:
    if "params.json" in names:
        return "; params.json is Meta's or Mistral's own layout, use the Hugging Face version"
    return "; pass a folder in Hugging Face's layout, as save_pretrained() writes it"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def file_names(folder: Path) -> set[str]:
    """Names directly in `folder`, broken links too: they get an error of their own."""
    try:
        return {path.name for path in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {os_reason(error)}") from error


def _read_bytes(path: Path) -> bytes:
    with os.fdopen(open_regular(path), "rb") as file:
        try:
            return file.read()
        except OSError as error:
            raise BadFileError(f"cannot be read: {os_reason(error)}") from error


def _json_object(raw: bytes) -> dict[str, Any]:
    """A JSON object; NaN and Infinity pass, since transformers writes them in some configs."""
    if not raw.strip():
        raise BadFileError("empty; download it again")
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"not valid JSON: {error}; download it again") from error
    if not isinstance(content, dict):
        raise BadFileError(f"a JSON {type(content).__name__}, not an object; download it again")
    return content


def _weight_map_faults(weight_map: Any) -> list[str]:
    if not isinstance(weight_map, dict) or not weight_map:
        return ['no "weight_map" that maps tensor names to shards; download it again']
    not_text = [name for name, shard in weight_map.items() if not isinstance(shard, str)]
    if not_text:
        return [f"weight_map[{printable(name)}] is not a file name" for name in not_text]
    return [fault for shard in sorted(set(weight_map.values())) for fault in _shard_faults(shard)]


def _shard_faults(shard: str) -> list[str]:
    """A shard is a .safetensors file inside the folder, or a link there, as HF's cache has them."""
    path, shown = PurePosixPath(shard), printable(shard)
    if shard != str(path) or not shard.isprintable():
        return [f"shard {shown} is not a plain relative file name"]
    if path.is_absolute() or ".." in path.parts or re.search(r"[\\:]", shard):
        return [f"shard {shown} is outside the checkpoint's folder, refused; is the index genuine?"]
    if shard.lower().endswith(_PICKLES):
        return [f"shard {shown} is a pickle file; loading pickle runs code, so it is refused"]
    if not shard.endswith(".safetensors"):
        return [f"shard {shown} is not a .safetensors file"]
    return []


def _disagreements(
    weight_map: Mapping[str, str], headers: Mapping[str, Header | None]
) -> list[str]:
    """Tensors that index and shards do not both place in one and the same file.

    What the index places in a shard whose header is bad is passed over: that error stands already.
    """
    placed: dict[str, list[str]] = {}
    for shard, header in headers.items():
        for tensor in header.tensors if header else ():
            placed.setdefault(tensor.name, []).append(shard)
    problems = []
    for name, shard in weight_map.items():
        where = placed.get(name, [])
        if headers[shard] and shard not in where:
            other = f"it is in {where[0]}" if where else "nor in any other shard"
            problems.append(
                f"{shard}: {printable(name)} is not in it, though {INDEX} says so; {other}"
            )
    for name, where in placed.items():
        if len(where) > 1:
            problems.append(f"{printable(name)} is in {len(where)} shards: {', '.join(where)}")
        if name not in weight_map:
            problems.append(f"{where[0]}: {printable(name)} is in it, but not in {INDEX}")
    return problems


def _notes(names: Collection[str], index: Index | None, found: list[TensorInfo]) -> list[str]:
    if index is None:
        both = INDEX in names
        return [f"{SINGLE} is read and {INDEX} is not, as transformers does"] if both else []
    held = sum(tensor.nbytes for tensor in found)
    if isinstance(index.total_size, int) and index.total_size != held:
        return [f"{INDEX} says total_size {index.total_size}, the shards hold {held}: no matter"]
    return []
