"""The tokenizer as `tokenizer.*` keys, from the files beside the weights.

Owns: token list, scores, types, merges, special tokens and chat template, in the two ways the
families have it: BPE with byte fallback (Gemma 4) and byte-level BPE (Qwen). Leaves out: which of
the two a family has (`architectures`), and SentencePiece models.
Source: `conversion/gemma.py` and `conversion/base.py` of llama.cpp; the tests compare with them.

llama.cpp takes the number of tokens for the number of embedding rows, so the list is padded to
that number with unused tokens, and a tokenizer with more tokens than rows is refused.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from gguf import GGUFValueType, TokenType

from moequant.architectures import ModelSpec, family_named
from moequant.architectures.family import Tokenizer
from moequant.checkpoint import Checkpoint
from moequant.errors import TokenizerError
from moequant.gguf_export.special_tokens import SpecialTokens, special_tokens
from moequant.gguf_export.writer import MetadataEntry

Token = tuple[str, TokenType]

NO_SCORE = -1000.0  # what the converter writes for every token of a BPE vocabulary
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
SPACE_IN_MERGE = chr(ord(" ") + 256)
ID_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # GGUF's spelling
    "pad": "padding_token_id",
    "mask": "mask_token_id",
    "eot": "eot_token_id",
}
ADDED_KEYS = {"bos": "add_bos_token", "eos": "add_eos_token", "sep": "add_sep_token"}


def tokenizer_metadata(spec: ModelSpec, checkpoint: Checkpoint) -> list[MetadataEntry]:
    """Every `tokenizer.*` entry; the token list has `spec.vocab_size` tokens.

    Raises:
        TokenizerError: tokenizer.json is missing, damaged, of another kind than the family's, or
            has more tokens than the model has embedding rows.
    """
    family = family_named(spec.architecture)
    document = _document(checkpoint, "tokenizer.json")
    settings = _document(checkpoint, "tokenizer_config.json", required=False)
    try:
        tokens = _tokens(family.tokenizer, checkpoint, document, spec.vocab_size)
        special = special_tokens(document, settings, checkpoint.config)
        merges = _merges(document)
        templates = list(_templates(checkpoint, settings))
    except (AttributeError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise TokenizerError(f"{checkpoint.path}: a damaged tokenizer ({reason}).") from error
    entries = {
        "ggml.model": _string(family.tokenizer.model),
        **({"ggml.pre": _string(family.tokenizer.pre)} if family.tokenizer.pre else {}),
        "ggml.tokens": _array([text for text, _ in tokens], GGUFValueType.STRING),
        "ggml.token_type": _array([int(kind) for _, kind in tokens], GGUFValueType.INT32),
        "ggml.merges": _array(merges, GGUFValueType.STRING),
        **_special_entries(special, spec.vocab_size),
        **dict(templates),
        **{
            f"ggml.{key}": (value, GGUFValueType.BOOL, None)
            for key, value in family.tokenizer.forced.items()
        },
    }
    if family.tokenizer.has_scores:
        entries["ggml.scores"] = _array([NO_SCORE] * len(tokens), GGUFValueType.FLOAT32)
    return [MetadataEntry(f"tokenizer.{key}", *value) for key, value in entries.items()]


Entry = tuple[Any, GGUFValueType, GGUFValueType | None]


def _string(value: str) -> Entry:
    return value, GGUFValueType.STRING, None


def _array(values: list[Any], kind: GGUFValueType) -> Entry:
    return values, GGUFValueType.ARRAY, kind


# --- files -----------------------------------------------------------------------------------


def _document(checkpoint: Checkpoint, name: str, *, required: bool = True) -> dict[str, Any]:
    """The JSON object in the file `name`; empty if it is not there and not required."""
    path = checkpoint.file(name)
    if path is None:
        if required:
            raise TokenizerError(
                f"{checkpoint.path}: {name} is missing; copy it from the original model."
            )
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: a {type(value).__name__}, not a JSON object.")
    return value


def _loaded(checkpoint: Checkpoint) -> Any:
    """transformers' tokenizer; no network, no code from the checkpoint."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # it raises whatever it meets
        reason = " ".join(str(error).split())[:500]
        raise TokenizerError(f"{checkpoint.path}: transformers refuses it: {reason}") from error
    if not tokenizer.is_fast:
        raise TokenizerError(f"{checkpoint.path}: tokenizer.json is not what transformers loads.")
    return tokenizer


# --- tokens ----------------------------------------------------------------------------------


def _tokens(
    row: Tokenizer, checkpoint: Checkpoint, document: dict[str, Any], rows: int
) -> list[Token]:
    """Text and type of each token, in the order of their ids, padded to `rows`."""
    check, read = KINDS[row.kind]
    check(row, checkpoint, document)
    tokens = read(row, _loaded(checkpoint))
    if tokens and max(tokens) >= rows:
        raise TokenizerError(
            f"{checkpoint.path}: the tokenizer goes up to id {max(tokens)}, but the model has "
            f"{rows} embedding rows; it belongs to another model."
        )
    unused = TokenType.UNUSED
    return [tokens.get(index, (f"[PAD{index}]", unused)) for index in range(rows)]


def _check_byte_fallback(row: Tokenizer, checkpoint: Checkpoint, document: dict[str, Any]) -> None:
    model = document["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise TokenizerError(
            f"{checkpoint.path}/tokenizer.json: {model['type']} without byte fallback, where "
            f"llama.cpp's {row.model!r} tokenizer is BPE with it."
        )


def _check_byte_level(row: Tokenizer, checkpoint: Checkpoint, document: dict[str, Any]) -> None:
    model = document["model"]
    parts = document.get("pre_tokenizer") or {}
    parts = parts.get("pretokenizers", [parts])
    patterns = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    levels = [part for part in parts if part.get("type") == "ByteLevel"]
    if model["type"] != "BPE" or patterns != [row.pattern] or len(levels) != 1:
        raise TokenizerError(
            f"{checkpoint.path}/tokenizer.json: {model['type']} that splits by {patterns} is not "
            f"llama.cpp's {row.pre!r}, which is byte-level BPE that splits by {[row.pattern]}."
        )


def _read_byte_fallback(row: Tokenizer, tokenizer: Any) -> dict[int, Token]:
    """By `gguf.LlamaHfVocab`: special is what transformers calls special, not the flag."""
    special = set(tokenizer.all_special_ids)
    base = tokenizer.vocab_size
    tokens = {}
    for text, index in tokenizer.get_vocab().items():
        if text in row.user_defined:
            kind = TokenType.USER_DEFINED
        elif index < base and BYTE.fullmatch(text):
            kind = TokenType.BYTE
        elif index in special:
            kind = TokenType.CONTROL
        else:
            kind = TokenType.NORMAL if index < base else TokenType.USER_DEFINED
        tokens[index] = (text, kind)
    return tokens


def _read_byte_level(row: Tokenizer, tokenizer: Any) -> dict[int, Token]:  # noqa: ARG001
    """By `get_vocab_base`: special is what is flagged so, or looks so."""
    added = tokenizer.added_tokens_decoder
    tokens: dict[int, Token] = {}
    for text, index in tokenizer.get_vocab().items():
        entry = added.get(index)
        if entry is None:
            tokens[index] = (text, TokenType.NORMAL)
            continue
        plain = text
        if not entry.normalized:  # llama.cpp takes control and user tokens as normalized already
            plain = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
        if entry.special or _looks_special(plain):
            tokens[index] = (plain, TokenType.CONTROL)
        else:
            tokens[index] = (plain.replace("▁", " "), TokenType.USER_DEFINED)
    return tokens


def _looks_special(text: str) -> bool:
    """Added tokens that some models forget to flag."""
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(left) and text.endswith(right) for left, right in brackets
    )


Check = Callable[[Tokenizer, Checkpoint, dict[str, Any]], None]
Read = Callable[[Tokenizer, Any], dict[int, Token]]
KINDS: dict[str, tuple[Check, Read]] = {
    "bpe_with_byte_fallback": (_check_byte_fallback, _read_byte_fallback),
    "byte_level_bpe": (_check_byte_level, _read_byte_level),
}


# --- merges, special tokens, chat template ---------------------------------------------------


def _merges(document: dict[str, Any]) -> list[str]:
    """Each merge as "left right"; a space inside a part is written as Ġ."""
    merges = document["model"].get("merges") or []
    if not merges:
        raise TokenizerError("tokenizer.json: no merges; llama.cpp cannot tokenize without them.")
    lines = []
    for merge in merges:
        if isinstance(merge, str):
            lines.append(merge)
        elif isinstance(merge, list) and len(merge) == 2:
            lines.append(" ".join(part.replace(" ", SPACE_IN_MERGE) for part in merge))
        else:
            raise TokenizerError(f"tokenizer.json: a merge that is not a pair: {merge!r}.")
    return lines


def _special_entries(special: SpecialTokens, rows: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for kind, index in special.ids.items():
        if not 0 <= index < rows:
            raise TokenizerError(f"{kind}_token has id {index}; the model has {rows} tokens.")
        if kind in ID_KEYS:
            entries[f"ggml.{ID_KEYS[kind]}"] = (index, GGUFValueType.UINT32, None)
    for kind, flag in special.added.items():
        if kind in ADDED_KEYS:
            entries[f"ggml.{ADDED_KEYS[kind]}"] = (flag, GGUFValueType.BOOL, None)
    return entries


def _templates(checkpoint: Checkpoint, settings: dict[str, Any]) -> Iterator[tuple[str, Entry]]:
    """The chat template, and further named ones where there are several."""
    template = settings.get("chat_template")
    if template is None and (path := checkpoint.file("chat_template.jinja")) is not None:
        template = path.read_text(encoding="utf-8")
        more = sorted((checkpoint.path / "additional_chat_templates").glob("*.jinja"))
        if more:
            named = [{"name": p.stem, "template": p.read_text(encoding="utf-8")} for p in more]
            template = [{"name": "default", "template": template}, *named]
    if template is None:
        template = _document(checkpoint, "chat_template.json", required=False).get("chat_template")
    if isinstance(template, str):
        yield "chat_template", _string(template)
    elif isinstance(template, list):
        yield from _named_templates(template)


def _named_templates(templates: list[dict[str, str]]) -> Iterator[tuple[str, Entry]]:
    others = []
    for entry in templates:
        name = re.sub(r"[^A-Za-z0-9]", "_", entry["name"])
        if name == "default":
            yield "chat_template", _string(entry["template"])
        else:
            others.append(name)
            yield f"chat_template.{name}", _string(entry["template"])
    if others:
        yield "chat_templates", _array(sorted(others), GGUFValueType.STRING)
