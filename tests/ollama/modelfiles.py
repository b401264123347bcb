"""Reads a Modelfile by Ollama's documented grammar and what its parser does; knows no writer.

Owns: `parse(text)` to a list of (instruction, value), instructions in lower case, a parameter's
value as (name, value), and the errors the grammar has. Leaves out: what values mean.
"""

INSTRUCTIONS = {
    "from", "parameter", "template", "system", "adapter", "license", "message", "requires",
    "renderer", "parser", "draft",
}  # fmt: skip
PARAMETERS = {  # the documented table of valid parameters and their types
    "num_ctx": int, "repeat_last_n": int, "repeat_penalty": float, "temperature": float,
    "seed": int, "stop": str, "num_predict": int, "top_k": int, "top_p": float, "min_p": float,
}  # fmt: skip


def parse(text: str) -> list[tuple[str, object]]:
    """Every instruction in order; ValueError for what is no Modelfile."""
    found: list[tuple[str, object]] = []
    rest = text
    while rest := rest.lstrip(" \t\r\n"):
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        word, rest = _word(rest)
        if word.lower() not in INSTRUCTIONS:
            raise ValueError(f"no instruction: {word!r}")
        if word.lower() == "parameter":
            name, rest = _word(rest.lstrip(" \t"))
            value, rest = _value(rest)
            found.append(("parameter", (name, PARAMETERS[name](value))))
        else:
            value, rest = _value(rest)
            found.append((word.lower(), value))
    if not any(word == "from" for word, _ in found):
        raise ValueError("no FROM line")
    return found


def _word(text: str) -> tuple[str, str]:
    end = next((i for i, c in enumerate(text) if c in " \t\r\n"), len(text))
    if end == len(text) or text[end] not in " \t":
        raise ValueError(f"no value after {text[:end]!r}")
    return text[:end], text[end + 1 :]


def _value(text: str) -> tuple[str, str]:
    """The value ends at the first line break at which what was read is complete."""
    for end in (i for i in range(len(text) + 1) if i == len(text) or text[i] in "\r\n"):
        value = _unquoted(text[:end].strip())
        if value is not None:
            quoted = text[:end].strip().startswith('"')
            kept = [c for c in value if c.isprintable() or (quoted and c in " \t\r\n")]
            return "".join(kept), text[end:]
    raise ValueError(f"quotes never close: {text[:40]!r}")


def _unquoted(text: str) -> str | None:
    if text.startswith('"""'):
        return text[3:-3] if len(text) >= 6 and text.endswith('"""') else None
    if text.startswith('"'):
        return text[1:-1] if len(text) >= 2 and text.endswith('"') else None
    return text
