"""Ollama's grammar of model names: `[host/][namespace/]model[:tag]`.

Owns: the check. Leaves out: whether a model of that name exists, which the server knows.

Source: Ollama's `types/model` package and its documentation of `ollama create`.
"""

import re

from moequant.errors import UsageError

LONGEST = 80  # characters of a namespace, model or tag
LONGEST_HOST = 350
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(:[0-9]{1,5})?")


def check_name(name: str) -> str:
    """`name`, if Ollama takes it for a model's name.

    Raises:
        UsageError: which part is wrong, and what it may hold.
    """
    *before, last = name.split("/")
    model, colon, tag = last.partition(":")
    parts = [("model", model, _PART, LONGEST)]
    if colon:
        parts.append(("tag", tag, _PART, LONGEST))
    if before:
        parts.append(("namespace", before[-1], _NAMESPACE, LONGEST))
    if len(before) > 1:
        parts.append(("host", before[-2], _HOST, LONGEST_HOST))
    wrong = [f"{what} {text!r}" for what, text, pattern, longest in parts
             if not pattern.fullmatch(text) or len(text) > longest]  # fmt: skip
    if len(before) > 2:
        wrong.append(f"{len(before)} slashes")
    if wrong:
        raise UsageError(
            f"{name!r} is no name for an Ollama model ({', '.join(wrong)}). It has the form "
            "[host/][namespace/]model[:tag]; the parts hold letters, digits, '_', '-' and '.' (a "
            f"namespace no '.'), start with a letter, digit or '_', at most {LONGEST} characters."
        )
    return name
