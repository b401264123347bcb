"""A Modelfile: what it holds, its text, and what the same thing is in a create request.

Owns: the grammar's writing side. Leaves out: where values come from (`describe`).

Source: Ollama's Modelfile reference and what its parser does: a value ends with its line, unless
it stands in quotes, one or three at each end (three may hold one); nothing is escaped; characters
that do not print are dropped, except spaces, tabs and line breaks inside quotes.
"""

from dataclasses import dataclass
from typing import Any

from moequant.errors import UsageError

Value = str | int | float
TRIPLE = '"""'
BLANKS = "\n\t\r "


@dataclass(frozen=True)
class Modelfile:
    """`sources` are the FROM lines. `parameters` are in order; a name may stand more than once."""

    sources: tuple[str, ...]
    parameters: tuple[tuple[str, Value], ...] = ()
    template: str | None = None
    renderer: str | None = None
    parser: str | None = None
    system: str | None = None
    license: str | None = None

    @property
    def text(self) -> str:
        """The file's content.

        Raises:
            UsageError: a value that the grammar has no way to write.
        """
        lines = [f"FROM {_bare('the path', source)}" for source in self.sources]
        lines += [f"{word} {_bare(word, value)}" for word, value in
                  (("RENDERER", self.renderer), ("PARSER", self.parser)) if value]  # fmt: skip
        lines += [f"PARAMETER {name} {_argument(name, value)}" for name, value in self.parameters]
        blocks = (("TEMPLATE", self.template), ("SYSTEM", self.system), ("LICENSE", self.license))
        lines += [f"{word} {_block(word, value)}" for word, value in blocks if value]
        return "\n".join(lines) + "\n"

    @property
    def request(self) -> dict[str, Any]:
        """The fields of `POST /api/create`, without `model` and `files`.

        The official client knows no `renderer` and `parser`: the server sets them by architecture.
        """
        parameters: dict[str, Any] = {}
        for name, value in self.parameters:
            if name == "stop":
                parameters.setdefault("stop", []).append(value)
            else:
                parameters[name] = value
        fields = {
            "template": self.template, "system": self.system, "license": self.license,
            "parameters": parameters,
        }  # fmt: skip
        return {name: value for name, value in fields.items() if value}


def writable(value: str) -> bool:
    """Whether a Modelfile can hold `value` in quotes."""
    return TRIPLE not in value and not _dropped(value)


def _argument(name: str, value: Value) -> str:
    """A parameter's value: numbers as they are, text in quotes."""
    if not isinstance(value, str):
        return str(value)
    if '"' in value or any(blank in value for blank in "\n\r"):
        return _block(name, value)
    return f'"{_printable(name, value)}"'


def _block(name: str, value: str) -> str:
    if TRIPLE in value:
        raise UsageError(f"{name}: a Modelfile cannot hold a value with {TRIPLE} in it.")
    return f"{TRIPLE}{_printable(name, value)}{TRIPLE}"


def _bare(name: str, value: str) -> str:
    if value != value.strip() or value.startswith('"') or any(c in value for c in "\n\r"):
        raise UsageError(f"{name}: a Modelfile cannot hold {value!r}; rename the file.")
    return _printable(name, value)


def _printable(name: str, value: str) -> str:
    dropped = _dropped(value)
    if dropped:
        raise UsageError(f"{name}: a Modelfile cannot hold the characters {dropped}.")
    return value


def _dropped(value: str) -> list[str]:
    """The characters that Ollama's parser would drop."""
    return sorted({c for c in value if not c.isprintable() and c not in BLANKS})
