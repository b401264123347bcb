"""Which token is which (`bos`, `eos` …), and which of them are added to a prompt.

Owns: reading that from tokenizer.json, tokenizer_config.json and config.json, by the rules of
`SpecialVocab` in the pinned llama.cpp's gguf-py. The `gguf` package on PyPI has an older
`SpecialVocab`, which does not write `add_bos_token` for byte-level tokenizers; so it is not used.
Leaves out: the vocabulary and GGUF keys (`tokenizer`).

A name is looked up among tokenizer.json's added tokens; ids in config.json serve where that fails.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moequant.errors import TokenizerError

KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "eot")
Json = Mapping[str, Any]


@dataclass
class SpecialTokens:
    """`ids` by kind, and for `bos`, `eos`, `sep` in `added` whether prompts get them."""

    ids: dict[str, int] = field(default_factory=dict)
    added: dict[str, bool] = field(default_factory=dict)


def special_tokens(tokenizer: Json, tokenizer_config: Json, config: Json) -> SpecialTokens:
    """The special tokens that the three JSON documents agree on; an absent document is empty."""
    texts = _texts(tokenizer_config)
    found = SpecialTokens()
    for processor in _processors(tokenizer):
        if processor["type"] == "ByteLevel":
            found.added.setdefault("bos", False)
            found.added.setdefault("eos", False)
        elif processor["type"] == "TemplateProcessing":
            _read_template(processor, texts, found.added)
        else:
            raise TokenizerError(f"tokenizer.json: unknown post_processor {processor['type']!r}.")
    for kind in KINDS:
        if isinstance(flag := tokenizer_config.get(f"add_{kind}_token"), bool):
            found.added.setdefault(kind, flag)
    ids = {token["content"]: token["id"] for token in reversed(tokenizer.get("added_tokens") or [])}
    text_config = config.get("text_config") or {}
    for kind in KINDS:
        name = f"{kind}_token_id"
        known = ids.get(texts.get(kind)) if tokenizer_config else None
        fallback = text_config.get(name) if config.get(name) is None else config[name]
        value = fallback if known is None else known
        if isinstance(value, int) and (kind != "eot" or known is not None):
            found.ids[kind] = value
    return found


def _texts(tokenizer_config: Json) -> dict[str, str]:
    """The special tokens that tokenizer_config.json names, as text."""
    texts = {}
    for kind in KINDS[:-1]:
        entry = tokenizer_config.get(f"{kind}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str) and text:
            texts[kind] = text
    for kind, stand_in in (("bos", "cls"), ("eos", "sep")):
        if kind not in texts and stand_in in texts:
            texts[kind] = texts[stand_in]
    return texts


def _processors(tokenizer: Json) -> Iterator[Json]:
    processor = tokenizer.get("post_processor")
    if processor:
        yield from processor.get("processors", [processor])


def _special(item: Json) -> str | None:
    text: str | None = item.get("SpecialToken", {}).get("id")
    return text


def _sequence(item: Json) -> str | None:
    name: str | None = item.get("Sequence", {}).get("id")
    return name


def _read_template(processor: Json, texts: dict[str, str], added: dict[str, bool]) -> None:
    """What a `TemplateProcessing` puts before, after and between; updates both dicts."""
    single = processor.get("single") or []
    first = _special(single[0]) if len(single) > 1 else None
    last = _special(single[-1]) if len(single) > 1 else None
    if first:
        if first not in (texts.get("bos"), texts.get("cls")):
            texts.setdefault("bos", first)
            texts.setdefault("cls", first)
        added["bos"] = first in (texts.get("bos"), texts.get("cls"))
    if last:
        if texts.get("eos") not in (None, last):
            texts["eot"] = texts["eos"]  # the configured one still ends a turn
        texts["eos"] = last
        added["eos"] = True
    _read_pair(processor.get("pair") or [], first, last, texts, added)


def _read_pair(
    pair: list[Json],
    first: str | None,
    last: str | None,
    texts: dict[str, str],
    added: dict[str, bool],
) -> None:
    """Whether something separates the two sequences of a pair: A [sep] [eos] B."""
    start = 1 if pair and first and _special(pair[0]) == first else 0
    stop = len(pair) - 1 if pair and last and _special(pair[-1]) == last else len(pair)
    inner = pair[start:stop]
    if len(inner) < 3 or _sequence(inner[0]) != "A" or _sequence(inner[-1]) != "B":
        return
    ends = {texts.get("sep"), texts.get("eos")} - {None}
    between = [_special(item) in ends for item in inner[1:-1]]
    added["sep"] = (between[0] and not last) or (len(between) == 2 and between[1])
    if added["sep"] and "eos" in texts:
        texts.setdefault("sep", texts["eos"])
