"""A plan as a text file: JSON that people read and edit, one tensor per line.

Owns: the format, its version, the checks of form, the atomic write. Leaves out: whether the types
make sense for the shapes or the model (`moequant.plan.plan`).

    {
      "version": 1,
      "preset": "Q4_K_M",
      "architecture": "gemma4",
      "base": "BF16",
      "imatrix": true,
      "tensors": {
        "token_embd.weight": {"type": "Q6_K", "shape": [512, 256]},
        "blk.0.ffn_down_exps.weight": {"type": "Q5_0", "shape": [16, 256, 96], "wanted": "Q4_K",
                                       "reason": "rows of 96 are not whole blocks of 256"}
      }
    }

`type` is what an editor may change, in any case. `shape` is in torch order and there to be read;
it must be the model's. `wanted` and `reason` stand where the type is a fallback, and mean nothing
once another type was written there. `base` is the float type of
what is not quantized, `imatrix` whether the types assume importance data.

A stack of experts may have `"experts": {"Q6_K": [0, 5], "Q3_K": [1]}`: experts, from 0, that have
another type than `type`, which all others have. Every reader refuses versions and fields it does
not know, so that no plan is half understood; the version is still 1, since a plan without this
field is what it was.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moequant.errors import PlanError, listing
from moequant.files import replacing
from moequant.plan.experts import form_offenders

VERSION = 1
_HEADER = {"preset": str, "architecture": str, "base": str, "imatrix": bool}
_REQUIRED = {"type", "shape"}
_OPTIONAL = {"wanted", "reason", "experts"}


def format_document(header: dict[str, Any], tensors: dict[str, dict[str, Any]]) -> str:
    """The text of a plan: JSON with one line per header field and per tensor."""
    fields = {"version": VERSION, **header}
    lines = [f"  {_json(key)}: {_json(value)}," for key, value in fields.items()]
    entries = ",\n".join(f"    {_json(name)}: {_json(entry)}" for name, entry in tensors.items())
    return "\n".join(["{", *lines, '  "tensors": {', entries, "  }", "}"]) + "\n"


def parse_document(text: str, source: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Header and tensors of a plan's text, every field present and of its JSON type.

    PlanError: not JSON, a name twice, another version, or a list of all fields that are wrong.
    """
    document = _load(text, source)
    if not isinstance(document, dict) or not isinstance(document.get("tensors"), dict):
        raise PlanError(f"{source}: not a plan; a plan is a JSON object with 'tensors'.")
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise PlanError(
            f"{source}: plan version {version!r}; this moequant reads version {VERSION}. "
            "Make the plan anew, or use the moequant that made it."
        )
    offenders = [*_header_offenders(document), *_entry_offenders(document["tensors"])]
    if offenders:
        raise PlanError(f"{source}: {len(offenders)} wrong in the plan:{listing(offenders)}")
    return {key: document[key] for key in _HEADER}, document["tensors"]


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all; ExportError if that fails."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """The text of a plan file; PlanError if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path}: the plan cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: not a plan: byte {error.start} is not UTF-8 text.") from error


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _load(text: str, source: str) -> Any:
    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise PlanError(f"{source}: named twice, keep one line of each:{listing(twice)}")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=object_of)
    except json.JSONDecodeError as error:
        raise PlanError(
            f"{source}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}."
        ) from error
    except (RecursionError, ValueError) as error:  # nesting, or integers of thousands of digits
        raise PlanError(f"{source}: not a plan: {error}.") from error


def _header_offenders(document: dict[str, Any]) -> Iterator[str]:
    for key, kind in _HEADER.items():
        if not isinstance(document.get(key), kind):
            yield f"{key}: expected {_kind(kind)}, found {document.get(key)!r}"
    for key in sorted(document.keys() - _HEADER.keys() - {"version", "tensors"}):
        yield f"{key}: no such field; remove it"


def _entry_offenders(tensors: dict[str, Any]) -> Iterator[str]:
    for name, entry in tensors.items():
        if not isinstance(entry, dict):
            yield f'{name}: expected {{"type": …, "shape": …}}, found {entry!r}'
            continue
        for key in sorted(_REQUIRED - entry.keys()):
            yield f"{name}: {key} is missing"
        for key in sorted(entry.keys() - _REQUIRED - _OPTIONAL):
            yield f"{name}: no such field: {key}; remove it"
        yield from _field_offenders(name, entry)


def _field_offenders(name: str, entry: dict[str, Any]) -> Iterator[str]:
    for key in ("type", "wanted", "reason"):
        if key in entry and not isinstance(entry[key], str):
            yield f"{name}: {key}: expected text, found {entry[key]!r}"
    if "shape" in entry and not _is_shape(entry["shape"]):
        yield f"{name}: shape: expected a list of positive integers, found {entry['shape']!r}"
    if "experts" in entry:
        yield from form_offenders(name, entry["experts"])


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= 4
        and all(type(n) is int and 0 < n < 2**63 for n in value)
    )


def _kind(kind: type) -> str:
    return "true or false" if kind is bool else "text"
