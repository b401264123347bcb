"""The tokenizer of a GGUF file, and whether a file has a reference's vocabulary and metadata.

Owns: building a tokenizer from `tokenizer.*` keys through transformers' own conversion, and the
comparison of keys. Leaves out: what is done with ids (`calibrate.windows`).

The tokenizer is the file's, as llama.cpp would run it, by number:
1. BOS is put before a text if `tokenizer.ggml.add_bos_token` says so, or else if llama.cpp forces
   it for the family, as for Gemma 4, whose own tokenizer leaves it to the chat template.
2. Tokens of type control or user-defined are matched whole in a text; others are only ever reached
   by merging, even if the checkpoint's tokenizer knows them as special.
3. There is no Unicode normalisation (Qwen's own tokenizer composes accents first; llama.cpp does
   not).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import TokenType

from moequant.architectures import FAMILIES, describe, family_named
from moequant.architectures.family import Family
from moequant.checkpoint import Checkpoint
from moequant.errors import ArchitectureError, GGUFError, TokenizerError
from moequant.gguf_export.metadata import hyperparameters
from moequant.gguf_export.tokenizer import tokenizer_metadata
from moequant.gguf_file import GGUFFile

Source = Checkpoint | GGUFFile
TOKENS, TYPES, MERGES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges"))
_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def gguf_tokenizer(file: GGUFFile) -> Any:
    """A transformers tokenizer (fast) from the metadata of `file`.

    Raises:
        ArchitectureError: a family that is not served.
        TokenizerError: keys missing, damaged, or of a kind that is not the family's.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )

    family = _family(file)
    _check_kind(file, family)
    tokens = _strings(file, TOKENS)
    _strings(file, MERGES)
    _check_types(file, len(tokens))
    renames: Mapping[str, str] = GGUF_TOKENIZER_MAPPING["tokenizer"]
    values = {name: file.metadata.get(f"tokenizer.{key}") for key, name in renames.items()}
    known = {name: value for name, value in values.items() if value is not None}
    try:
        backend, _ = convert_gguf_tokenizer(family.architecture, known)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=file.metadata.get("tokenizer.chat_template"),
            add_bos_token=_adds_bos(file, family),
            add_eos_token=bool(file.metadata.get("tokenizer.ggml.add_eos_token", False)),
            **_special_tokens(file, tokens),
        )
    except TokenizerError:
        raise
    except Exception as error:  # it raises whatever it meets
        reason = " ".join(str(error).split())[:500]
        raise TokenizerError(
            f"{file.path}: transformers refuses its tokenizer: {reason}"
        ) from error


def check_vocabulary(file: Source, reference: Source) -> None:
    """GGUFError unless both have the same tokens under the same ids; the first other one is named.

    Ids that either side marks as unused are passed over: converters name padding differently.
    Raises TokenizerError for a checkpoint or a file without a readable tokenizer.
    """
    ours, theirs = _vocabulary(file), _vocabulary(reference)
    names = f"{file.path} is not a file of the model {reference.path}"
    if len(ours) != len(theirs):
        raise GGUFError(f"{names}: it has {len(ours)} tokens, the reference {len(theirs)}.")
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one[0] != other[0] and TokenType.UNUSED not in (one[1], other[1]):
            raise GGUFError(
                f"{names}: token {index} is {one[0]!r:.80}, in the reference {other[0]!r:.80}."
            )


def metadata_differences(file: Source, reference: Source) -> list[str]:
    """One line for each `{arch}.*` key whose value is not what the reference has, or would export.

    Of a file's further keys those whose meaning is not known here are left out; a count of 0 is
    the same as no such key.
    """
    ours, theirs = _hyperparameters(file), _hyperparameters(reference)
    return [
        f"{key} is {_shown(ours.get(key))}, the reference has {_shown(theirs.get(key))}"
        for key in sorted({*ours, *theirs})
        if (_plain(ours.get(key)) or None) != (_plain(theirs.get(key)) or None)
    ]


# --- the file's keys -------------------------------------------------------------------------


def _family(file: GGUFFile) -> Family:
    architecture = file.metadata.get("general.architecture")
    served = [family.architecture for family in FAMILIES]
    if architecture not in served:
        raise ArchitectureError(
            f"{file.path}: architecture {architecture!r:.80} is not supported. It can be: "
            f"{', '.join(served)}."
        )
    return family_named(architecture)


def _check_kind(file: GGUFFile, family: Family) -> None:
    """Another kind of tokenizer would give other ids without an error."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    model, pre = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model != family.tokenizer.model:
        raise TokenizerError(
            f"{file.path}: tokenizer.ggml.model is {model!r:.80}; {family.architecture} has "
            f"{family.tokenizer.model!r}."
        )
    if family.tokenizer.pre and pre not in GGUF_PRE_TOKENIZER_SPLITS:
        raise TokenizerError(
            f"{file.path}: tokenizer.ggml.pre is {pre!r:.80}; "
            f"{', '.join(sorted(GGUF_PRE_TOKENIZER_SPLITS))} are known."
        )


def _strings(file: GGUFFile, key: str) -> list[str]:
    value = file.metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        found = "missing" if value is None else "not a list of strings"
        raise TokenizerError(f"{file.path}: {key} is {found}.")
    return value


def _check_types(file: GGUFFile, count: int) -> list[int]:
    types = file.metadata.get(TYPES)
    if not isinstance(types, list) or len(types) != count:
        raise TokenizerError(f"{file.path}: {TYPES} is missing, or not one for each token.")
    return types


def _adds_bos(file: GGUFFile, family: Family) -> bool:
    """Whether llama.cpp puts BOS before a text (1)."""
    forced = family.tokenizer.forced.get("add_bos_token", False)
    return forced or bool(file.metadata.get("tokenizer.ggml.add_bos_token", False))


def _special_tokens(file: GGUFFile, tokens: list[str]) -> dict[str, str]:
    """`bos_token` and others that the file has."""
    found = {}
    for name, key in _IDS.items():
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if type(index) is not int or not 0 <= index < len(tokens):
            raise TokenizerError(
                f"{file.path}: tokenizer.ggml.{key}_token_id is {index!r:.80}, of {len(tokens)} "
                "tokens."
            )
        found[f"{name}_token"] = tokens[index]
    return found


# --- comparison ------------------------------------------------------------------------------


def _vocabulary(source: Source) -> list[tuple[str, int]]:
    """(token, type) for each id."""
    if isinstance(source, GGUFFile):
        tokens = _strings(source, TOKENS)
        return list(zip(tokens, _check_types(source, len(tokens)), strict=True))
    entries = tokenizer_metadata(describe(source), source)
    values = {entry.key: entry.value for entry in entries}
    return list(zip(values[TOKENS], values[TYPES], strict=True))


def _hyperparameters(source: Source) -> dict[str, Any]:
    """The `{arch}.*` keys that are known here: of a file, or that a checkpoint would export."""
    if not isinstance(source, GGUFFile):
        return {entry.key: entry.value for entry in hyperparameters(describe(source))}
    family = _family(source)
    known = {f"{family.architecture}.{key.name}" for key in family.keys}
    return {key: value for key, value in source.metadata.items() if key in known}


def _plain(value: Any) -> Any:
    """As it can be compared: floats in 32 bits, one value where all layers have the same."""
    if isinstance(value, list):
        items = [_plain(item) for item in value]
        return items[0] if items and all(item == items[0] for item in items) else items
    return float(np.float32(value)) if isinstance(value, float) else value


def _shown(value: Any) -> str:
    if value is None:
        return "not there"
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value[:8]))}{', …' if len(value) > 8 else ''}]"
    return str(float(str(np.float32(value)))) if isinstance(value, float) else str(value)
