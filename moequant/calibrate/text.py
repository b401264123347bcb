"""Calibration text: from files, folders, JSONL or the built-in corpus to documents.

Owns: finding and reading the text, and its hash. Leaves out: tokens (`windows`).

A source is a `.jsonl` file (one object per line, with `text`, or with `messages` and optionally
`tools` for the chat template), any other file (plain UTF-8 text, one document), or a folder, which
stands for its `.txt`, `.md` and `.jsonl` files, recursively, in sorted order. The built-in corpus
is the package's `corpus/*.txt`, whose documents are separated by lines that hold only `%%`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from moequant.errors import CalibrationError

TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
BUILT_IN = "moequant built-in corpus"
_SEPARATOR = "%%"


@dataclass(frozen=True)
class Document:
    """One text, or one conversation that the chat template still has to render.

    `origin` says where it came from ("file", or "file:line"). `messages` and `tools` are as
    `apply_chat_template` takes them; with them `text` is empty.
    """

    origin: str
    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Corpus:
    """Documents in reading order, and the names they go by in the imatrix file."""

    documents: tuple[Document, ...]
    datasets: tuple[str, ...]

    def digest(self) -> str:
        """SHA-256 over the contents in order; where the files lie does not matter."""
        digest = hashlib.sha256()
        for document in self.documents:
            parts = [document.text, document.messages, document.tools]
            digest.update(json.dumps(parts, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()


def read_corpus(sources: Sequence[Path]) -> Corpus:
    """Read all `sources`, or the built-in corpus when there are none.

    Raises CalibrationError for a source that is missing, undecodable, malformed or without text.
    """
    if not sources:
        return Corpus(tuple(packaged_documents("moequant.calibrate", BUILT_IN)), (BUILT_IN,))
    documents = [
        document for source in sources for file in _files(source) for document in _read_file(file)
    ]
    if not any(document.text or document.messages for document in documents):
        raise CalibrationError(f"no text in {', '.join(map(str, sources))}; give one that has some")
    return Corpus(tuple(documents), tuple(map(str, sources)))


def packaged_documents(package: str, name: str) -> Iterator[Document]:
    """The documents in `corpus/*.txt` of an installed package; they go by `name`."""
    folder = resources.files(package) / "corpus"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".txt")), key=lambda f: f.name)
    if not files:
        raise CalibrationError(f"this installation lacks the {name}; give a text")
    for file in files:
        for text in _split(file.read_text("utf-8").splitlines(keepends=True)):
            yield Document(f"{name}/{file.name}", text)


def _split(lines: Iterable[str]) -> Iterator[str]:
    text: list[str] = []
    for line in lines:
        if line.strip() != _SEPARATOR:
            text.append(line)
        elif text:
            yield "".join(text)
            text = []
    if "".join(text).strip():
        yield "".join(text)


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise CalibrationError(f"{source}: no such file or folder to read text from")
    found = [f for f in source.rglob("*") if f.suffix.lower() in TEXT_SUFFIXES and f.is_file()]
    if not found:
        raise CalibrationError(f"{source}: no {', '.join(TEXT_SUFFIXES)} files in this folder")
    return sorted(found)


def _read_file(file: Path) -> Iterator[Document]:
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{file}: byte 0x{error.object[error.start]:02x} at offset {error.start} is not UTF-8; "
            "convert the file, or leave it out"
        ) from error
    except OSError as error:
        raise CalibrationError(f"{file}: cannot be read: {error.strerror}") from error
    if file.suffix.lower() != ".jsonl":
        yield Document(str(file), text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _parse_line(f"{file}:{number}", line)


def _parse_line(origin: str, line: str) -> Document:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{origin}: not JSON: {error}") from error
    if isinstance(record, dict):
        _check_characters(origin, record)
        if isinstance(record.get("text"), str):
            return Document(origin, record["text"])
        messages, tools = _objects(record.get("messages")), _objects(record.get("tools"))
        if messages:
            return Document(origin, messages=messages, tools=tools)
    raise CalibrationError(f'{origin}: needs "text" (a string) or "messages" (a list of objects)')


def _check_characters(origin: str, record: dict[str, Any]) -> None:
    """Raise CalibrationError for half a surrogate pair: JSON can escape one, text has none."""
    used = [record.get(name) for name in ("text", "messages", "tools")]
    try:
        json.dumps(used, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{origin}: {error.object[error.start]!r} is half a character (a lone surrogate); "
            "correct the line, or leave it out"
        ) from error
    except RecursionError as error:
        raise CalibrationError(f"{origin}: nested too deeply") from error


def _objects(value: object) -> tuple[dict[str, Any], ...]:
    """A list of objects as it is, anything else as nothing."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return tuple(value)
    return ()
